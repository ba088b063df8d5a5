//! What the kernel says of a mapping of this process.

/// The flags of the mapping at this address, in the kernel's two letters (proc(5), `smaps`): `dd` is memory that core dumps leave out.
///
/// # Panics
///
/// If nothing is mapped there.
pub fn mapping_flags(address: usize) -> Vec<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("/proc is there");
    let number = |text| usize::from_str_radix(text, 16).ok();
    let mut inside = false;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|word| word.split_once('-'));
        if let Some((Some(from), Some(to))) = range.map(|(from, to)| (number(from), number(to))) {
            inside = (from..to).contains(&address);
        } else if let (true, Some(flags)) = (inside, line.strip_prefix("VmFlags:")) {
            return flags.split_whitespace().map(str::to_owned).collect();
        }
    }
    panic!("nothing is mapped at {address:x}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_heap_can_be_written_to_and_is_dumped() {
        let here = Box::new(0_u8);
        let flags = mapping_flags(&raw const *here as usize);
        assert!(flags.iter().any(|flag| flag == "wr") && flags.iter().all(|flag| flag != "dd"), "{flags:?}");
    }

    #[test]
    #[should_panic(expected = "nothing is mapped at 0")]
    fn nothing_is_mapped_at_zero() {
        mapping_flags(0);
    }
}
