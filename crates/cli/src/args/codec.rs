//! `pagewarp codec`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use pagewarp_codec::EncodingSet;

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
    /// Measure encoding and decoding of an image on one core, and verify the round trip
    Bench {
        /// Image of raw 4096-byte pages
        image: PathBuf,
        /// Common options.
        #[command(flatten)]
        images: Images,
        /// Use this instruction set instead of the best one: scalar, avx2 or avx512
        #[arg(long, value_name = "LEVEL")]
        simd: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
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
