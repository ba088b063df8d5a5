//! The rules for the end of an LZ4 block.

use pagewarp_codec::PAGE_SIZE;

/// Checks that the sequences of an LZ4 block make one page, and that it follows the rules for the end of a block
/// (`docs/page-encodings.md`, section 4), which bind encoders and which decoders need not check.
///
/// # Errors
///
/// What is wrong.
pub fn check_end_of_block(block: &[u8]) -> Result<(), String> {
    check_end_of_block_of(block, PAGE_SIZE)
}

/// The same for an LZ4 block that makes this many plain bytes.
///
/// # Errors
///
/// What is wrong.
pub fn check_end_of_block_of(block: &[u8], len: usize) -> Result<(), String> {
    let (mut at, mut plain, mut last_match) = (0, 0, None);
    loop {
        let token = byte(block, at)?;
        at += 1;
        let literals = length(block, &mut at, token >> 4)?;
        at += literals;
        plain += literals;
        if at >= block.len() {
            if (at, plain) != (block.len(), len) {
                return Err(format!("ends at byte {at} of {} and plain byte {plain} of {len}", block.len()));
            }
            return match last_match {
                Some(_) if literals < 5 => Err(format!("{literals} literals at the end")),
                Some(start) if start + 12 > len => Err(format!("the last match starts at {start}")),
                _ => Ok(()),
            };
        }
        let offset = byte(block, at)? | byte(block, at + 1)? << 8;
        if !(1..=plain).contains(&offset) {
            return Err(format!("offset {offset} at plain byte {plain}"));
        }
        at += 2;
        last_match = Some(plain);
        plain += 4 + length(block, &mut at, token & 15)?;
    }
}

fn byte(block: &[u8], at: usize) -> Result<usize, String> {
    block.get(at).copied().map(usize::from).ok_or_else(|| "the block ends in a sequence".to_owned())
}

/// A length that begins with these four bits of the token.
fn length(block: &[u8], at: &mut usize, nibble: usize) -> Result<usize, String> {
    let mut len = nibble;
    let mut more = nibble == 15;
    while more {
        let next = byte(block, *at)?;
        len += next;
        more = next == 255;
        *at += 1;
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One byte again and again: a match from byte 1 on, then this many literals.
    fn block(last: u8) -> Vec<u8> {
        // 1 literal, and a match of 4 + 15 + 15 * 255 + 246 bytes, as in the test vectors, but for what `last` changes.
        let mut block = vec![0x1f, 0x61, 1, 0];
        block.extend([255; 15]);
        block.extend([246 + 5 - last, last << 4]);
        block.extend(vec![0x61; usize::from(last)]);
        block
    }

    #[test]
    fn a_block_that_ends_as_it_should_passes_and_others_do_not() {
        assert_eq!(check_end_of_block(&block(5)), Ok(()));
        assert_eq!(check_end_of_block(&block(9)), Ok(()));
        assert_eq!(check_end_of_block(&block(4)), Err("4 literals at the end".into()));
        assert_eq!(check_end_of_block(&block(0)), Err("0 literals at the end".into()));
        for cut in 0..block(5).len() {
            assert!(check_end_of_block(&block(5)[..cut]).is_err(), "cut at {cut}");
        }
        let mut far = block(5);
        far[2] = 2;
        assert_eq!(check_end_of_block(&far), Err("offset 2 at plain byte 1".into()));
        // All literals: there is no match that could be too late.
        let mut literals = vec![0xf0];
        literals.extend([255; 16]);
        literals.push(1);
        literals.extend([7; PAGE_SIZE]);
        assert_eq!(check_end_of_block(&literals), Ok(()));
        // A second match that starts 11 bytes before the end.
        let mut late = vec![0x1f, 0x61, 1, 0];
        late.extend([255; 15]);
        late.extend([240 - 15, 0x02, 1, 0, 0x50, 1, 2, 3, 4, 5]);
        let plain = 1 + 4 + 15 + 15 * 255 + 225;
        assert_eq!(plain, 4070, "the second match starts here and has 6 bytes");
        assert!(check_end_of_block(&late).is_err(), "4081 bytes");
        late[19] = 240;
        assert_eq!(check_end_of_block(&late), Err("the last match starts at 4085".into()));
    }
}
