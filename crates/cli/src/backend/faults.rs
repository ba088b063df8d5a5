//! Faults of the GPU on demand, for tests: the environment variable `PAGEWARP_GPU_FAULTS`, described in docs/testing.md.

use std::num::NonZeroU64;
use std::time::Duration;

use anyhow::Result;
use pagewarp_gpu::Faults;

use crate::exit::{Exit, failure};

const VARIABLE: &str = "PAGEWARP_GPU_FAULTS";

/// What goes wrong with the GPU of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Injected {
    /// The faults themselves.
    pub(super) faults: Faults,
    /// How long a stalled device is waited for, if not as long as usual.
    pub(super) stall_timeout: Option<Duration>,
    /// Whether the device gets every batch, however busy it is.
    pub(super) no_spill: bool,
}

impl Injected {
    /// What the environment says; nothing, if it does not.
    pub(super) fn from_env() -> Result<Injected> {
        match std::env::var(VARIABLE) {
            Ok(text) => {
                parse(&text).map_err(|error| failure(Exit::Usage, format!("{VARIABLE}=`{text}`: {error}")))
            }
            Err(std::env::VarError::NotPresent) => Ok(Injected::default()),
            Err(error) => Err(failure(Exit::Usage, format!("{VARIABLE}: {error}"))),
        }
    }
}

fn parse(text: &str) -> Result<Injected, String> {
    let mut injected = Injected::default();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let number = |value: &str| value.parse::<u64>().map_err(|error| format!("`{part}`: {error}"));
        match part.split_once('=') {
            Some(("lose-after", value)) => injected.faults.lose_after = Some(number(value)?),
            Some(("stall-after", value)) => injected.faults.stall_after = Some(number(value)?),
            Some(("no-memory-after", value)) => injected.faults.no_memory_after = Some(number(value)?),
            Some(("corrupt-one-in", value)) => {
                let one_in = NonZeroU64::new(number(value)?);
                injected.faults.corrupt_one_in = Some(one_in.ok_or(format!("`{part}`: expected 1 or more"))?);
            }
            Some(("stall-timeout-ms", value)) => {
                injected.stall_timeout = Some(Duration::from_millis(number(value)?));
            }
            None if part == "no-spill" => injected.no_spill = true,
            _ => {
                return Err(format!(
                    "unknown fault `{part}`; expected a list of lose-after=N, stall-after=N, no-memory-after=N, \
                     corrupt-one-in=N, stall-timeout-ms=N and no-spill"
                ));
            }
        }
    }
    Ok(injected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_has_a_word() {
        let all = "lose-after=1,stall-after=2,no-memory-after=3,corrupt-one-in=4,stall-timeout-ms=5,no-spill";
        let expected = Injected {
            faults: Faults {
                lose_after: Some(1),
                stall_after: Some(2),
                no_memory_after: Some(3),
                corrupt_one_in: NonZeroU64::new(4),
            },
            stall_timeout: Some(Duration::from_millis(5)),
            no_spill: true,
        };
        assert_eq!(parse(all), Ok(expected));
        assert_eq!(parse(""), Ok(Injected::default()));
    }

    #[test]
    fn a_bad_value_is_refused() {
        for text in
            ["lose-after", "lose-after=x", "corrupt-one-in=0", "burn=1", "stall-after=-1", "no-spill=1"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
