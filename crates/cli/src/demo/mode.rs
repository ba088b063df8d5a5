//! The modes that the demo compares: pipeline on or off, encodings on or off.

use clap::ValueEnum;
use pagewarp_codec::{Encoding, EncodingSet};

/// One way to migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Mode {
    /// Stages one after another, every page as it is: the classic baseline
    SequentialRaw,
    /// Stages one after another, zero pages elided
    Sequential,
    /// All stages at once, encodings as in `sequential`
    Pipelined,
    /// All stages at once, all encodings
    PipelinedCompressed,
    /// All stages at once, all encodings, computed by a GPU on both sides
    PipelinedGpu,
}

impl Mode {
    /// All of them, in the order of the table.
    pub const ALL: [Mode; 5] = [
        Mode::SequentialRaw,
        Mode::Sequential,
        Mode::Pipelined,
        Mode::PipelinedCompressed,
        Mode::PipelinedGpu,
    ];

    /// The name in reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Mode::SequentialRaw => "sequential-raw",
            Mode::Sequential => "sequential",
            Mode::Pipelined => "pipelined",
            Mode::PipelinedCompressed => "pipelined-compressed",
            Mode::PipelinedGpu => "pipelined-gpu",
        }
    }

    /// Whether the stages work at once.
    pub fn pipeline(self) -> bool {
        !matches!(self, Mode::SequentialRaw | Mode::Sequential)
    }

    /// Whether a GPU computes the encodings.
    pub fn on_gpu(self) -> bool {
        self == Mode::PipelinedGpu
    }

    /// The encodings to offer.
    pub fn encodings(self) -> EncodingSet {
        match self {
            Mode::SequentialRaw => EncodingSet::RAW,
            Mode::Sequential | Mode::Pipelined => EncodingSet::of(&[Encoding::Zero]),
            Mode::PipelinedCompressed | Mode::PipelinedGpu => EncodingSet::ALL,
        }
    }

    /// Whether a migration that never fits the downtime limit is a result rather than a failure: for the baselines.
    pub fn may_not_converge(self) -> bool {
        !self.pipeline()
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_as_they_print() {
        for mode in Mode::ALL {
            assert_eq!(Mode::from_str(mode.name(), false), Ok(mode));
        }
    }
}
