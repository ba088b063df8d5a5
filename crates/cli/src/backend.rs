//! Who computes encodings: from the name that was typed to the thing itself.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use pagewarp_codec::{CpuBackend, SharedBackend, Simd};

use crate::exit::{Exit, failure};

/// The CPU backend at this SIMD level, or at the best one of this host.
pub fn cpu(simd: Option<&str>) -> Result<CpuBackend> {
    let Some(level) = simd else { return Ok(CpuBackend::new()) };
    let level: Simd =
        level.parse().map_err(|e| failure(Exit::Usage, format!("instruction set `{level}`: {e}")))?;
    CpuBackend::with_simd(level).map_err(|e| failure(Exit::Environment, e.to_string()))
}

/// The backend of this name: `auto` is the best there is on this host, which today is `cpu`.
pub fn by_name(name: &str, simd: Option<&str>) -> Result<SharedBackend> {
    match name {
        "auto" | "cpu" => Ok(Arc::new(cpu(simd)?)),
        _ => {
            Err(anyhow!(failure(Exit::Usage, format!("unknown backend `{name}`; expected `auto` or `cpu`"))))
        }
    }
}

/// The name of the SIMD level that the CPU backend takes on this host.
pub fn simd_name() -> String {
    CpuBackend::new().simd().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::exit_of;

    #[test]
    fn what_does_not_exist_is_a_usage_error() {
        assert_eq!(exit_of(&by_name("gpu9", None).err().unwrap()), Exit::Usage);
        assert_eq!(exit_of(&by_name("cpu", Some("mmx")).err().unwrap()), Exit::Usage);
        assert!(by_name("cpu", Some("scalar")).is_ok());
    }
}
