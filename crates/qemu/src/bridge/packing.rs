//! Compressing the payloads of a segment together, with contexts that are used over and over: making one costs as much as a few pages.

use std::io;

use pagewarp_codec::{Lz4BlockEncoder, decode_lz4_blocks};
use pagewarp_engine::error::MigrationError;
use pagewarp_wire::{WireError, malformed};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::CParameter;

use crate::protocol::meta::Form;

/// The level of zstd that pages are compressed with: the lowest one that also shortens bytes without repetitions. Those below 1 pass them as they are.
const ZSTD_LEVEL: i32 = 1;
/// How it looks for repetitions. The table (4 bytes each) stays in the cache that is nearest to the core, and what is shorter than this is not looked for: less than
/// a tenth more bytes than at level 1, for three quarters of its work (docs/qemu-performance.md).
const ZSTD_PARAMETERS: [CParameter; 2] = [CParameter::HashLog(12), CParameter::MinMatch(7)];

/// Compresses payloads.
pub(crate) struct Packer {
    lz4: Lz4BlockEncoder,
    zstd: Compressor<'static>,
}

impl Packer {
    pub(crate) fn new() -> Result<Packer, MigrationError> {
        let mut zstd = Compressor::new(ZSTD_LEVEL).map_err(no_context)?;
        for parameter in ZSTD_PARAMETERS {
            zstd.set_parameter(parameter).map_err(no_context)?;
        }
        Ok(Packer { lz4: Lz4BlockEncoder::new(), zstd })
    }

    /// Makes `packed` the payload in this form; `false` if that would be no shorter, or is no form to compress in.
    pub(crate) fn pack(&mut self, form: Form, payload: &[u8], packed: &mut Vec<u8>) -> bool {
        packed.clear();
        match form {
            Form::Plain | Form::Encoded => false,
            Form::Lz4 => self.lz4.encode(payload, packed),
            Form::Zstd => {
                packed.resize(payload.len(), 0);
                match self.zstd.compress_to_buffer(payload, &mut packed[..]) {
                    Ok(len) if len < payload.len() => {
                        packed.truncate(len);
                        true
                    }
                    // There was no room for the result.
                    _ => false,
                }
            }
        }
    }
}

fn no_context(error: io::Error) -> MigrationError {
    MigrationError::Internal(format!("zstd cannot be set up: {error}"))
}

/// Decompresses payloads.
pub(crate) struct Unpacker {
    zstd: Decompressor<'static>,
}

impl Unpacker {
    pub(crate) fn new() -> Result<Unpacker, MigrationError> {
        Ok(Unpacker { zstd: Decompressor::new().map_err(no_context)? })
    }

    /// Fills `payload`, whose length the tables tell.
    pub(crate) fn unpack(&mut self, form: Form, packed: &[u8], payload: &mut [u8]) -> Result<(), WireError> {
        let len = payload.len();
        let seen = match form {
            Form::Plain | Form::Encoded => return Ok(()),
            Form::Lz4 => decode_lz4_blocks(packed, payload).map(|()| len).map_err(|e| e.to_string()),
            Form::Zstd => self.zstd.decompress_to_buffer(packed, payload).map_err(|e| e.to_string()),
        };
        match seen {
            Ok(seen) if seen == len => Ok(()),
            Ok(seen) => Err(malformed(
                "a compressed payload",
                format_args!("{seen} bytes"),
                format_args!("{len} bytes"),
            )),
            Err(why) => Err(malformed("a compressed payload", why, format_args!("{len} bytes"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_come_back_and_damage_is_noticed() {
        let (mut packer, mut unpacker) = (Packer::new().unwrap(), Unpacker::new().unwrap());
        let payload: Vec<u8> = (0..200_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        for form in [Form::Lz4, Form::Zstd] {
            let mut packed = vec![1];
            assert!(packer.pack(form, &payload, &mut packed));
            assert!(packed.len() < payload.len() / 2, "{form:?}: {} bytes", packed.len());
            let mut back = vec![7; payload.len()];
            unpacker.unpack(form, &packed, &mut back).unwrap();
            assert!(back == payload, "{form:?}");
            for wrong in [payload.len() - 1, payload.len() + 1, 0] {
                unpacker.unpack(form, &packed, &mut vec![0; wrong]).unwrap_err();
            }
            unpacker.unpack(form, &packed[..packed.len() / 2], &mut back).unwrap_err();
            let noise: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            let _ = unpacker.unpack(form, &noise, &mut back);
        }
    }

    #[test]
    fn bytes_that_do_not_repeat_are_shortened_by_zstd_if_some_are_rarer_than_others() {
        let mut random = vec![0; 100_000];
        pagewarp_testkit::rng::SplitMix64::new(1).fill(&mut random);
        let skewed: Vec<u8> = random.iter().map(|byte| byte & (byte >> 4)).collect();
        let mut packed = Vec::new();
        assert!(Packer::new().unwrap().pack(Form::Zstd, &skewed, &mut packed));
        assert!(packed.len() < skewed.len() * 9 / 10, "{} bytes", packed.len());
    }

    #[test]
    fn what_does_not_shrink_is_left_alone() {
        let mut packer = Packer::new().unwrap();
        let mut noise = vec![0; 70_000];
        pagewarp_testkit::rng::SplitMix64::new(1).fill(&mut noise);
        for form in [Form::Lz4, Form::Zstd, Form::Encoded] {
            assert!(!packer.pack(form, &noise, &mut Vec::new()), "{form:?}");
        }
    }
}
