//! What the guest says: lines on its serial console.

use std::str::FromStr;

/// The guest is filled and works from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Name of the workload.
    pub workload: String,
    /// MiB of memory it lays claim to.
    pub mem_mib: u64,
    /// MiB of that with contents.
    pub filled_mib: u64,
    /// MiB of that which get written.
    pub ws_mib: u64,
    /// How long filling took.
    pub fill_ms: u64,
}

/// Counters. Those without a time in their name count from `ready` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Number of the report; the first is 1.
    pub seq: u64,
    /// Guest time since its start.
    pub t_ms: u64,
    /// Operations of the workload: writes, or vertices for `graph`.
    pub ops: u64,
    /// Page writes: a page written twice counts twice.
    pub pages_written: u64,
    /// Longest pause since the report before.
    pub last_pause_us: u64,
    /// Longest pause since `ready`.
    pub max_pause_us: u64,
    /// How often all memory has been checked.
    pub sweeps: u64,
    /// Corruptions found.
    pub errors: u64,
}

/// The guest did not run for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// How long.
    pub us: u64,
    /// Guest time at its end.
    pub at_ms: u64,
}

/// Memory that is not what the guest left there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// What kind of thing is wrong, such as `record-sum` or `page-version`.
    pub what: String,
    /// Guest-physical address.
    pub address: u64,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
    /// Guest time.
    pub at_ms: u64,
}

/// One line of the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// See [`Ready`].
    Ready(Ready),
    /// See [`Report`].
    Report(Report),
    /// See [`Pause`].
    Pause(Pause),
    /// See [`Corruption`].
    Corrupt(Corruption),
    /// The guest ends: an exception, a panic, or a command line it does not understand.
    Fault(String),
    /// The guest is about to reset its machine, as told.
    Exit {
        /// Guest time.
        t_ms: u64,
        /// Corruptions found.
        errors: u64,
    },
    /// Something odd that is no error, such as an unknown parameter.
    Warning(String),
}

impl Event {
    /// Reads a line, without or with its line ending. `None`: it is none of these, or damaged.
    pub fn parse(line: &str) -> Option<Event> {
        let line = line.trim_end_matches(['\r', '\n']);
        let (head, rest) = line.split_once(' ')?;
        let fields = Fields(rest);
        Some(match head {
            "pagewarp-guest" if rest.starts_with("ready ") => Event::Ready(Ready {
                workload: fields.text("workload")?.to_owned(),
                mem_mib: fields.number("mem_mib")?,
                filled_mib: fields.number("filled_mib")?,
                ws_mib: fields.number("ws_mib")?,
                fill_ms: fields.number("fill_ms")?,
            }),
            "report" => Event::Report(Report {
                seq: fields.number("seq")?,
                t_ms: fields.number("t_ms")?,
                ops: fields.number("ops")?,
                pages_written: fields.number("pages")?,
                last_pause_us: fields.number("pause_us")?,
                max_pause_us: fields.number("max_pause_us")?,
                sweeps: fields.number("sweeps")?,
                errors: fields.number("errors")?,
            }),
            "pause" => Event::Pause(Pause { us: fields.number("us")?, at_ms: fields.number("at_ms")? }),
            "CORRUPT" => Event::Corrupt(Corruption {
                what: fields.text("what")?.to_owned(),
                address: fields.hex("address")?,
                expected: fields.hex("expected")?,
                found: fields.hex("found")?,
                at_ms: fields.number("at_ms")?,
            }),
            "FAULT" => Event::Fault(rest.to_owned()),
            "exit" => Event::Exit { t_ms: fields.number("t_ms")?, errors: fields.number("errors")? },
            "warning" => Event::Warning(rest.to_owned()),
            _ => return None,
        })
    }
}

impl Report {
    /// Reads a report line; `None`: it is some other line.
    pub fn parse(line: &str) -> Option<Report> {
        match Event::parse(line) {
            Some(Event::Report(report)) => Some(report),
            _ => None,
        }
    }
}

/// `key=value` words.
struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    fn text(&self, key: &str) -> Option<&'a str> {
        self.0.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    fn number<T: FromStr>(&self, key: &str) -> Option<T> {
        self.text(key)?.parse().ok()
    }

    fn hex(&self, key: &str) -> Option<u64> {
        u64::from_str_radix(self.text(key)?.strip_prefix("0x")?, 16).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_kind_parse() {
        let report = Report::parse(
            "report seq=3 t_ms=4783 ops=16 pages=17 pause_us=4521 max_pause_us=9397 sweeps=3 errors=1\r\n",
        );
        let expected = Report {
            seq: 3,
            t_ms: 4783,
            ops: 16,
            pages_written: 17,
            last_pause_us: 4521,
            max_pause_us: 9397,
            sweeps: 3,
            errors: 1,
        };
        assert_eq!(report, Some(expected));
        let ready = "pagewarp-guest ready workload=kv mem_mib=508 filled_mib=345 ws_mib=100 rate=10000 seed=1 fill_ms=4209";
        let expected =
            Ready { workload: "kv".to_owned(), mem_mib: 508, filled_mib: 345, ws_mib: 100, fill_ms: 4209 };
        assert_eq!(Event::parse(ready), Some(Event::Ready(expected)));
        assert_eq!(
            Event::parse("pause us=8156 at_ms=4235"),
            Some(Event::Pause(Pause { us: 8156, at_ms: 4235 }))
        );
        let corrupt = "CORRUPT what=page-sum address=0x1f000 expected=0xffffffffffffffff found=0x0 at_ms=9";
        let expected = Corruption {
            what: "page-sum".to_owned(),
            address: 0x1_f000,
            expected: u64::MAX,
            found: 0,
            at_ms: 9,
        };
        assert_eq!(Event::parse(corrupt), Some(Event::Corrupt(expected)));
        assert_eq!(Event::parse("exit t_ms=12 errors=0"), Some(Event::Exit { t_ms: 12, errors: 0 }));
        assert_eq!(Event::parse("FAULT bad command line"), Some(Event::Fault("bad command line".to_owned())));
    }

    #[test]
    fn damaged_and_foreign_lines_are_refused() {
        for line in [
            "",
            "report",
            "report seq=3",
            "report seq=x t_ms=1",
            "pause us= at_ms=4",
            "pagewarp-guest start cmdline=\"\"",
            "SeaBIOS 1.16",
        ] {
            assert_eq!(Event::parse(line), None, "{line:?}");
        }
        let huge = "pause us=99999999999999999999 at_ms=4";
        assert_eq!(Event::parse(huge), None);
    }
}
