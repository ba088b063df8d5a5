//! Sizes, rates and times as people type and read them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use pagewarp_kvm::config::{MAX_MEMORY_BYTES, MIN_MEMORY_BYTES};

/// A number of bytes: `4096`, `512M`, `2G`, `1GiB`. Suffixes are powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// Bytes per second: `1Gbit`, `500Mbit`, `100MB/s`, `64MiB/s`. Bits and `B` are powers of 1000, `iB` of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate {
    /// The rate in bytes per second, at least 1.
    pub bytes_per_s: u64,
}

const SIZE_HINT: &str = "write a number and K, M, G or T (powers of 1024), for example 512M or 2GiB";
const RATE_HINT: &str = "write for example 1Gbit, 500Mbit, 100MB/s or 64MiB/s";

/// Splits `2.5G` into its number and its suffix.
fn split_number(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    Some((number, text[end..].trim_start()))
}

/// `number * unit`, if that is a whole count that fits.
fn scale(number: f64, unit: f64) -> Option<u64> {
    let value = number * unit;
    // Above 2^53 a float no longer counts single bytes; nothing real is that big.
    (value.fract() == 0.0 && value < (1u64 << 53) as f64).then_some(value as u64)
}

/// Less history than this holds next to nothing: a number without its unit, most likely.
const MIN_HISTORY_BYTES: u64 = 1 << 20;

/// Memory for a history: so much, or what suits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HistoryChoice {
    /// What suits.
    Auto,
    /// So much.
    Size(ByteSize),
}

impl FromStr for HistoryChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<HistoryChoice, String> {
        match text {
            "auto" => Ok(HistoryChoice::Auto),
            _ => match text.parse()? {
                ByteSize(1..MIN_HISTORY_BYTES) => Err(format!(
                    "too little to be of use, expected 0 or at least {}; a bare number means bytes, write for example 512M",
                    ByteSize(MIN_HISTORY_BYTES)
                )),
                size => Ok(HistoryChoice::Size(size)),
            },
        }
    }
}

impl fmt::Display for HistoryChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HistoryChoice::Auto => f.write_str("auto"),
            HistoryChoice::Size(size) => size.fmt(f),
        }
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<ByteSize, String> {
        let (number, suffix) = split_number(text.trim()).ok_or_else(|| format!("not a size; {SIZE_HINT}"))?;
        let shift = match suffix.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            "kb" | "mb" | "gb" | "tb" => {
                return Err(format!(
                    "`{suffix}` is not used here because it may mean 1000 or 1024; write `{0}` or `{0}iB` for powers of 1024",
                    suffix[..1].to_ascii_uppercase()
                ));
            }
            _ => return Err(format!("unknown suffix `{suffix}`; {SIZE_HINT}")),
        };
        let bytes = scale(number, (1u64 << shift) as f64)
            .ok_or_else(|| format!("not a whole number of bytes, or too big; {SIZE_HINT}"))?;
        Ok(ByteSize(bytes))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
        match units.iter().find(|(shift, _)| self.0 > 0 && self.0.is_multiple_of(1 << shift)) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Rate, String> {
        let (number, suffix) = split_number(text.trim()).ok_or_else(|| format!("not a rate; {RATE_HINT}"))?;
        let lower = suffix.to_ascii_lowercase();
        let unit = lower.strip_suffix("/s").unwrap_or(&lower);
        let bytes = match unit {
            "bit" => 1.0 / 8.0,
            "kbit" => 1e3 / 8.0,
            "mbit" => 1e6 / 8.0,
            "gbit" => 1e9 / 8.0,
            "b" => 1.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "kib" => 1024.0,
            "mib" => 1048576.0,
            "gib" => 1073741824.0,
            "" => return Err(format!("a rate needs a unit; {RATE_HINT}")),
            _ => return Err(format!("unknown unit `{suffix}`; {RATE_HINT}")),
        };
        match scale((number * bytes).trunc(), 1.0) {
            Some(0) | None => Err(format!("must be between 1 byte and 2^53 bytes a second; {RATE_HINT}")),
            Some(bytes_per_s) => Ok(Rate { bytes_per_s }),
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.bytes_per_s * 8;
        let units = [(1_000_000_000, "Gbit"), (1_000_000, "Mbit"), (1_000, "kbit")];
        match units.iter().find(|(unit, _)| bits >= *unit) {
            Some((unit, name)) => write!(f, "{}{name}/s", trim(bits as f64 / *unit as f64)),
            None => write!(f, "{bits}bit/s"),
        }
    }
}

/// At most two decimals, without trailing zeros.
fn trim(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Parses the memory of a VM: within its limits, and a multiple of 2 MiB.
pub fn memory_size(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse()?;
    if size.0 < MIN_MEMORY_BYTES {
        let least = ByteSize(MIN_MEMORY_BYTES);
        return Err(format!(
            "too little for a VM, at least {least}; a bare number means bytes, write for example 512M"
        ));
    }
    if size.0 > MAX_MEMORY_BYTES {
        return Err(format!("too much for a VM, at most {}", ByteSize(MAX_MEMORY_BYTES)));
    }
    if !size.0.is_multiple_of(2 << 20) {
        return Err("must be a multiple of 2M".to_owned());
    }
    Ok(size)
}

/// Parses seconds, at least a millisecond: `30`, `0.5`, `2m`, `1h`.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let hint = "write seconds, or a number and ms, s, m or h, for example 90 or 2m";
    let (number, suffix) = split_number(text.trim()).ok_or_else(|| format!("not a time; {hint}"))?;
    let unit = match suffix {
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("unknown unit `{suffix}`; {hint}")),
    };
    let time = Duration::try_from_secs_f64(number * unit).map_err(|e| format!("{e}; {hint}"))?;
    if time < Duration::from_millis(1) || time > Duration::from_secs(30 * 24 * 3600) {
        return Err("must be between 1 ms and 30 days".to_owned());
    }
    Ok(time)
}

/// The same, or 0.
pub fn seconds_or_none(text: &str) -> Result<Duration, String> {
    if text.trim() == "0" { Ok(Duration::ZERO) } else { seconds(text) }
}

/// Bytes for people: `1.50 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.iter().find(|(shift, _)| bytes >= 1 << shift) {
        Some((shift, unit)) => format!("{:.2} {unit}", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

/// Milliseconds for people: `850 µs`, `12.3 ms`, `4.56 s`.
pub fn human_ms(ms: f64) -> String {
    if ms < 1.0 {
        format!("{:.0} µs", ms * 1000.0)
    } else if ms < 1000.0 {
        format!("{ms:.1} ms")
    } else {
        format!("{:.2} s", ms / 1000.0)
    }
}

/// A bit rate for people: `0.94 Gbit/s`.
pub fn human_rate(bytes_per_s: f64) -> String {
    let bits = bytes_per_s * 8.0;
    if bits >= 1e9 { format!("{:.2} Gbit/s", bits / 1e9) } else { format!("{:.1} Mbit/s", bits / 1e6) }
}

/// How many times smaller: `3.25x`; a dash where nothing was sent.
pub fn human_ratio(plain: u64, encoded: u64) -> String {
    if encoded == 0 { "-".to_owned() } else { format!("{:.2}x", plain as f64 / encoded as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1024),
            ("512M", 512 << 20),
            ("2G", 2 << 30),
            ("1GiB", 1 << 30),
            ("1.5G", 3 << 29),
        ] {
            assert_eq!(text.parse::<ByteSize>(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn a_size_that_means_nothing_is_refused() {
        for text in ["", "G", "1X", "-1G", "1GB", "0.3", "1e9", "99999999999T", "1.2.3G"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_print_as_they_parse() {
        for text in ["0", "4097", "4K", "512M", "2G", "3T"] {
            assert_eq!(text.parse::<ByteSize>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn rates_know_bits_and_bytes() {
        for (text, bytes_per_s) in [
            ("1Gbit", 125_000_000),
            ("1Gbit/s", 125_000_000),
            ("500Mbit", 62_500_000),
            ("100MB/s", 100_000_000),
            ("64MiB/s", 64 << 20),
            ("2.5Gbit", 312_500_000),
        ] {
            assert_eq!(text.parse::<Rate>(), Ok(Rate { bytes_per_s }), "{text}");
        }
        // `mbps` may be bits or bytes: better asked than guessed.
        for text in ["", "1", "1G", "0Gbit", "fast", "1bit", "500mbps"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
        assert_eq!("2.5Gbit".parse::<Rate>().unwrap().to_string(), "2.5Gbit/s");
    }

    #[test]
    fn memory_that_no_vm_can_have_is_refused() {
        assert!(memory_size("512M").is_ok());
        for text in ["512", "1M", "33M", "100000T"] {
            assert!(memory_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_history_is_of_some_use_or_none_at_all() {
        for text in ["auto", "0", "1M", "2G"] {
            assert_eq!(text.parse::<HistoryChoice>().map(|choice| choice.to_string()), Ok(text.to_owned()));
        }
        for text in ["1", "10", "512", "1023K", "much"] {
            assert!(text.parse::<HistoryChoice>().is_err(), "{text}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(seconds("30"), Ok(Duration::from_secs(30)));
        assert_eq!(seconds("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(seconds("2m"), Ok(Duration::from_secs(120)));
        for text in ["", "0", "-1", "1y", "9999h"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn people_read_round_numbers() {
        assert_eq!(human_bytes(3 << 29), "1.50 GiB");
        assert_eq!(human_ms(0.85), "850 µs");
        assert_eq!(human_ms(4560.0), "4.56 s");
        assert_eq!(human_rate(117_500_000.0), "940.0 Mbit/s");
        assert_eq!(human_ratio(10, 0), "-");
    }
}
