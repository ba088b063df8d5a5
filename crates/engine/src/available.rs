//! How much memory this host has left for this process.

use std::path::Path;

/// Where version 2 of the control groups is mounted.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Who limits the memory of this process, and the bytes that each of them has left. Empty where nothing is known.
pub fn limits() -> Vec<(&'static str, u64)> {
    let read = |path| std::fs::read_to_string(path).ok();
    let host = read("/proc/meminfo").and_then(|text| mem_available(&text));
    let group = read("/proc/self/cgroup").and_then(|text| group_available(Path::new(CGROUP_ROOT), &text));
    let all = [("the host", host), ("this process's control group (memory.max)", group)];
    all.into_iter().filter_map(|(who, left)| Some((who, left?))).collect()
}

/// Bytes that this process can still take; `None` where nothing is known.
pub fn memory_bytes() -> Option<u64> {
    limits().into_iter().map(|(_, left)| left).min()
}

/// What `/proc/meminfo` says, in bytes.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// What the limits of a process's control group and of the groups around it leave, in bytes; absent without version 2 or without limits.
/// `cgroup` is what `/proc/PID/cgroup` says.
fn group_available(root: &Path, cgroup: &str) -> Option<u64> {
    let group = cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // A group outside of the namespace that is mounted here shows as `..`.
    if group.split('/').any(|part| part == "..") {
        return None;
    }
    Path::new(group).ancestors().filter_map(|group| left_in(&root.join(group))).min()
}

/// What one group's limit leaves.
fn left_in(group: &Path) -> Option<u64> {
    let number = |name| std::fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    let (max, current) = (number("memory.max")?, number("memory.current")?);
    // Files that the kernel keeps in memory count as used, but make way, as they do in `MemAvailable`.
    let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let files = ["active_file ", "inactive_file "]
        .into_iter()
        .filter_map(|name| stat.lines().find_map(|line| line.strip_prefix(name))?.trim().parse::<u64>().ok());
    Some(max.saturating_sub(current.saturating_sub(files.sum())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_memory_is_read() {
        let text = "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\n";
        assert_eq!(mem_available(text), Some(8_000_000 << 10));
        assert_eq!(mem_available("MemTotal: 1 kB"), None);
    }

    #[test]
    fn the_tightest_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |group: &str, name: &str, text: &str| {
            let group = root.path().join(group);
            std::fs::create_dir_all(&group).unwrap();
            std::fs::write(group.join(name), text).unwrap();
        };
        let available = |cgroup: &str| group_available(root.path(), cgroup);
        assert_eq!(available("0::/a/b\n"), None, "no limits");
        write("a", "memory.max", "1000\n");
        write("a", "memory.current", "700\n");
        write("a", "memory.stat", "anon 500\nactive_file 50\ninactive_file 100\n");
        write("a/b", "memory.max", "max\n");
        write("a/b", "memory.current", "600\n");
        assert_eq!(available("4:memory:/x\n0::/a/b\n"), Some(450));
        write("a/b", "memory.max", "600\n");
        assert_eq!(available("0::/a/b\n"), Some(0));
        assert_eq!(available("0::/\n"), None);
        assert_eq!(available("0::/../a\n"), None);
        assert_eq!(available("4:memory:/a\n"), None, "version 1 alone");
    }
}
