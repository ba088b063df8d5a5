//! Shuffles that pack and unpack eight bytes, for instruction sets without `vpcompressb`.

/// Entry m moves the bytes whose bit in m is set to the front, in order; the others become zero.
pub(super) static COMPRESS: [[u8; 8]; 256] = table(true);

/// Entry m moves the front bytes to the places whose bit in m is set, in order; the others become zero.
pub(super) static EXPAND: [[u8; 8]; 256] = table(false);

/// A shuffle index with the top bit set makes `pshufb` write a zero.
const ZERO: u8 = 0x80;

const fn table(compress: bool) -> [[u8; 8]; 256] {
    let mut table = [[ZERO; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let mut byte = 0;
        let mut packed = 0;
        while byte < 8 {
            if mask >> byte & 1 != 0 {
                if compress {
                    table[mask][packed] = byte as u8;
                } else {
                    table[mask][byte] = packed as u8;
                }
                packed += 1;
            }
            byte += 1;
        }
        mask += 1;
    }
    table
}
