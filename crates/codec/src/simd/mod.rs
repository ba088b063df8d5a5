//! The inner loops, once per instruction set. All of them give the same bytes; `scalar` is the reference.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod lut;
mod masks;
mod scalar;

use std::fmt;
use std::str::FromStr;

pub(crate) use masks::Masks;

use crate::error::PageError;
use crate::page::Page;

/// An instruction set that the codec has its own inner loops for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Simd {
    /// Portable code on 64-bit words; the reference.
    Scalar,
    /// 256-bit vectors: `avx2`, `bmi1`, `bmi2`, `popcnt`, `lzcnt`.
    Avx2,
    /// 512-bit vectors: `avx512f`, `avx512bw`, `avx512vbmi2`, and all of [`Simd::Avx2`].
    Avx512,
}

impl Simd {
    /// Every level, slowest first.
    pub const ALL: [Simd; 3] = [Simd::Scalar, Simd::Avx2, Simd::Avx512];

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let avx2 = || {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("popcnt")
                && is_x86_feature_detected!("lzcnt")
        };
        match self {
            Simd::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => avx2(),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => {
                avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vbmi2")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Simd::Avx2 | Simd::Avx512 => false,
        }
    }

    /// All levels this machine has, slowest first; never empty.
    pub fn available() -> Vec<Simd> {
        Simd::ALL.into_iter().filter(|simd| simd.is_available()).collect()
    }

    /// The fastest level this machine has.
    pub fn detect() -> Simd {
        Simd::ALL.into_iter().rev().find(|simd| simd.is_available()).unwrap_or(Simd::Scalar)
    }

    /// `scalar`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            Simd::Scalar => "scalar",
            Simd::Avx2 => "avx2",
            Simd::Avx512 => "avx512",
        }
    }
}

impl fmt::Display for Simd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Simd {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Simd::ALL
            .into_iter()
            .find(|simd| simd.name() == text)
            .ok_or_else(|| format!("unknown SIMD level `{text}`; expected scalar, avx2 or avx512"))
    }
}

/// The inner loops of one level. Holding one proves that the machine has that level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernels {
    simd: Simd,
}

/// Calls the function of the same name at the level of `$self`.
macro_rules! dispatch {
    ($self:ident, $call:ident $(::<$generic:tt>)? ($($arg:expr),*)) => {
        match $self.simd {
            Simd::Scalar => scalar::$call$(::<$generic>)?($($arg),*),
            // SAFETY: `Kernels::new` is the only constructor and has checked that the machine has this level.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { avx2::$call$(::<$generic>)?($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { avx512::$call$(::<$generic>)?($($arg),*) },
            #[cfg(not(target_arch = "x86_64"))]
            Simd::Avx2 | Simd::Avx512 => unreachable!("refused by Kernels::new"),
        }
    };
}

impl Kernels {
    /// The loops of this level, if the machine has it.
    pub(crate) fn new(simd: Simd) -> Option<Kernels> {
        simd.is_available().then_some(Kernels { simd })
    }

    /// The level.
    pub(crate) fn simd(self) -> Simd {
        self.simd
    }

    /// Whether all bytes are zero. Stops at the first line with a byte that is not.
    pub(crate) fn is_zero(self, page: &Page) -> bool {
        dispatch!(self, is_zero(page))
    }

    /// Finds the bytes that are not zero in the page, or in its XOR with `base`.
    pub(crate) fn scan(self, page: &Page, base: Option<&Page>, masks: &mut Masks) {
        match base {
            None => dispatch!(self, scan::<false>(page, page, masks)),
            Some(base) => dispatch!(self, scan::<true>(page, base, masks)),
        }
    }

    /// Appends the sparse form of the page, or of its XOR with `base`, for which `masks` was scanned. With the masks of
    /// another page the form is wrong, but nothing is read or written out of bounds.
    pub(crate) fn emit_sparse(self, page: &Page, base: Option<&Page>, masks: &Masks, out: &mut Vec<u8>) {
        match base {
            None => dispatch!(self, emit_sparse::<false>(page, page, masks, out)),
            Some(base) => dispatch!(self, emit_sparse::<true>(page, base, masks, out)),
        }
    }

    /// Decodes a sparse payload, and XORs it with `base` if there is one. After an error `out` holds anything.
    pub(crate) fn decode_sparse(
        self,
        payload: &[u8],
        base: Option<&Page>,
        out: &mut Page,
    ) -> Result<(), PageError> {
        match base {
            None => dispatch!(self, decode_sparse::<false>(payload, &Page::ZERO, out)),
            Some(base) => dispatch!(self, decode_sparse::<true>(payload, base, out)),
        }
    }

    /// `out = page XOR base`.
    pub(crate) fn xor(self, page: &Page, base: &Page, out: &mut Page) {
        dispatch!(self, xor(page, base, out));
    }

    /// `page = page XOR base`.
    pub(crate) fn xor_in_place(self, page: &mut Page, base: &Page) {
        dispatch!(self, xor_in_place(page, base));
    }
}
