//! Who is to compute encodings, in a word: `auto`, `cpu`, `gpu` or `gpu:N`.

use std::fmt;
use std::str::FromStr;

/// A backend, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendName {
    /// The best one of this host.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number in `pagewarp devices`, else the first one.
    Gpu(Option<usize>),
}

impl FromStr for BackendName {
    type Err = String;

    fn from_str(text: &str) -> Result<BackendName, String> {
        match text {
            "auto" => Ok(BackendName::Auto),
            "cpu" => Ok(BackendName::Cpu),
            "gpu" => Ok(BackendName::Gpu(None)),
            _ => match text.strip_prefix("gpu:").map(str::parse) {
                Some(Ok(number)) => Ok(BackendName::Gpu(Some(number))),
                _ => Err(format!(
                    "unknown backend `{text}`; expected auto, cpu, gpu, or gpu:N with a number that `pagewarp devices` lists"
                )),
            },
        }
    }
}

impl fmt::Display for BackendName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackendName::Auto => f.write_str("auto"),
            BackendName::Cpu => f.write_str("cpu"),
            BackendName::Gpu(None) => f.write_str("gpu"),
            BackendName::Gpu(Some(number)) => write!(f, "gpu:{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_print_as_they_parse() {
        for name in ["auto", "cpu", "gpu", "gpu:0", "gpu:12"] {
            assert_eq!(name.parse::<BackendName>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn what_is_no_backend_is_refused() {
        for name in ["", "GPU", "gpu9", "gpu:", "gpu:x", "gpu:-1", "cpu:0", "fake"] {
            let error = name.parse::<BackendName>().unwrap_err();
            assert!(error.contains("pagewarp devices"), "{error}");
        }
    }
}
