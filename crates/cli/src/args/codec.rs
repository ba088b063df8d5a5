//! `pagewarp codec`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use pagewarp_codec::EncodingSet;

use crate::backend::BackendName;

/// `pagewarp codec`.
#[derive(Clone, Debug, Args)]
pub struct CodecArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: CodecCommand,
}

/// What to do with an image: a file of raw 4096-byte pages.
#[derive(Clone, Debug, Subcommand)]
pub enum CodecCommand {
    /// Measure encoding and decoding of an image on one core or a GPU, and verify the round trip
    Bench(BenchArgs),
    /// Encode an image into a container
    Encode {
        /// Image of raw 4096-byte pages
        image: PathBuf,
        /// Container to write
        out: PathBuf,
        /// Common options.
        #[command(flatten)]
        images: Images,
    },
    /// Decode a container into an image
    Decode {
        /// Container to read
        input: PathBuf,
        /// Image to write
        out: PathBuf,
        /// The base image that the container was encoded against
        #[arg(long, value_name = "IMAGE0")]
        base: Option<PathBuf>,
    },
}

/// `pagewarp codec bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Image of raw 4096-byte pages [default: a generated one like the memory of a guest, measured as pages that are sent for the first time, and again as pages of which 1 % has changed]
    pub image: Option<PathBuf>,
    /// Common options.
    #[command(flatten)]
    pub images: Images,
    /// Who encodes and decodes: one core of the CPU, a GPU (`gpu`, or `gpu:N` as `pagewarp devices` lists them) beside the CPU, or `auto` for the GPU where there is one
    #[arg(long, value_name = "auto|cpu|gpu[:N]", default_value = "cpu")]
    pub backend: BackendName,
    /// The CPU is to use this instruction set instead of the best one: scalar, avx2 or avx512
    #[arg(long, value_name = "LEVEL")]
    pub simd: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// How to encode.
#[derive(Clone, Debug, Args)]
pub struct Images {
    /// Earlier version of the image, the base of deltas; page numbers correspond
    #[arg(long, value_name = "IMAGE0")]
    pub base: Option<PathBuf>,
    /// The encodings to use: `all`, or a list such as zero,raw,lz4
    #[arg(long, value_name = "LIST", default_value = "all")]
    pub encodings: EncodingSet,
}
