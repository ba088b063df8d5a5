# The consoles of source and destination, one after the other, must read as that of one machine that never stopped:
# ticks without gap or repetition, clocks that never go back, all self-checks good, no complaint of the kernel.
# Prints the first thing that is wrong and exits with status 1, or prints nothing.
function wrong(what) {
    if (!bad) print what
    bad = 1
}
{ sub(/\r$/, "") }
/FAIL|BAD|BUG|Oops|Call Trace|stall|lockup|[Uu]nstable|Kernel panic/ { wrong($0) }
/^inner: Linux/ { boots++ }
/tick/ {
    if (!/^tick [0-9]+ up=[0-9.]+ date=[0-9]+ check=ok$/) {
        wrong("a damaged line: " $0)
        next
    }
    split($3, up, "=")
    split($4, date, "=")
    if ($2 != last + 1) wrong("after tick " last + 0 " came: " $0)
    if (up[2] + 0 < last_up || date[2] + 0 < last_date) wrong("a clock went back: " $0)
    last = $2 + 0
    last_up = up[2] + 0
    last_date = date[2] + 0
}
END {
    if (boots != 1) wrong("the guest booted " boots + 0 " times")
    if (last + 0 == 0) wrong("no tick")
    exit bad
}
