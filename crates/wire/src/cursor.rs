//! Reading little-endian fields out of bounded bytes.

use crate::error::{WireError, malformed};

/// A place in the bytes of a message. Every read is checked; nothing is allocated for what is not there.
pub struct Cursor<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// Starts at the first of `bytes`; errors name `what`.
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { what, rest: bytes }
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or(WireError::Truncated {
            what: self.what,
            seen: self.rest.len() as u64,
            expected: len as u64,
        })?;
        self.rest = rest;
        Ok(head)
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let bytes = self.bytes(N)?;
        Ok(bytes.try_into().expect("`bytes` returns as many bytes as asked for"))
    }

    /// The next number of this width.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        self.array().map(u8::from_le_bytes)
    }

    /// The next number of this width.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next number of this width.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next number of this width.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// An unsigned LEB128 number of at most 64 bits in its shortest form.
    pub fn varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if (bits << shift) >> shift != bits {
                return Err(malformed("variable-length number", "more than 64 bits", "at most 64 bits"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(malformed(
                        "variable-length number",
                        "a needless zero byte",
                        "the shortest form",
                    ));
                }
                return Ok(value);
            }
        }
        Err(malformed("variable-length number", "more than 10 bytes", "at most 10 bytes"))
    }

    /// A byte that is 0 or 1.
    pub fn bool(&mut self, what: &'static str) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            seen => Err(malformed(what, seen, "0 or 1")),
        }
    }

    /// Checks that nothing is left.
    pub fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(malformed(self.what, format_args!("{} bytes after its end", self.rest.len()), "none"))
        }
    }
}

/// Appends an unsigned LEB128 number in its shortest form.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// How many bytes [`put_varint`] appends.
pub fn varint_len(value: u64) -> usize {
    (64 - value.leading_zeros() as usize).div_ceil(7).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<u64, WireError> {
        let mut cursor = Cursor::new("a number", bytes);
        let value = cursor.varint()?;
        cursor.end().map(|()| value)
    }

    #[test]
    fn varints_come_back_at_every_length() {
        for shift in 0..64 {
            for value in [1u64 << shift, (1 << shift) - 1, u64::MAX >> shift] {
                let mut bytes = Vec::new();
                put_varint(&mut bytes, value);
                assert_eq!(bytes.len(), varint_len(value));
                assert_eq!(read(&bytes), Ok(value));
            }
        }
    }

    #[test]
    fn varints_have_one_form() {
        let max = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        assert_eq!(read(&max), Ok(u64::MAX));
        let mut above = max;
        above[9] = 0x02;
        assert!(matches!(read(&above), Err(WireError::Malformed { .. })), "65 bits");
        above[9] = 0x81;
        assert!(matches!(read(&above), Err(WireError::Malformed { .. })), "11 bytes");
        assert!(matches!(read(&[0x80, 0x00]), Err(WireError::Malformed { .. })), "a needless byte");
        assert!(matches!(read(&[0x80]), Err(WireError::Truncated { .. })), "cut");
        assert!(matches!(read(&[]), Err(WireError::Truncated { .. })), "nothing");
    }
}
