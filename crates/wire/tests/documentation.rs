//! The examples in `docs/wire-protocol.md` are what this crate writes.

mod support;

use pagewarp_wire::{BatchMeta, Channel, Direction, Kind, Message};
use support::{batch_frame, open_reader};

const DOCUMENT: &str = include_str!("../../../docs/wire-protocol.md");

/// The bytes of the code block after the marker `<!-- example: NAME -->`.
fn example(name: &str) -> Vec<u8> {
    let (_, rest) =
        DOCUMENT.split_once(&format!("<!-- example: {name} -->\n```\n")).expect("the example is there");
    let (block, _) = rest.split_once("```").expect("the block ends");
    block.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).expect("a byte in hex")).collect()
}

/// Bytes as the document writes them.
fn hex(bytes: &[u8]) -> String {
    let line = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    bytes.chunks(16).map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn ping_is_as_documented() {
    let (_, mut writer) = open_reader(Channel::Control, Direction::ToDestination);
    let mut frame = Vec::new();
    writer.control(&Message::Ping { id: 5 }, &mut frame).unwrap();
    assert_eq!(example("ping"), frame, "should be\n{}", hex(&frame));
}

#[test]
fn batch_of_zeros_is_as_documented() {
    let batch = BatchMeta {
        epoch: 2,
        region: 1,
        pages: (512..768).collect(),
        tags: vec![0; 256],
        lens: vec![0; 256],
        plain_hash: 0x1122_3344_5566_7788,
        ..BatchMeta::default()
    };
    let (_, frame) = batch_frame(&batch);
    assert_eq!(example("zero batch"), frame, "should be\n{}", hex(&frame));
}

#[test]
fn table_of_kinds_is_as_documented() {
    for kind in Kind::ALL {
        let mut places = String::new();
        for (channel, c) in [(Channel::Control, 'C'), (Channel::Data, 'D')] {
            for (direction, d) in [(Direction::ToDestination, '→'), (Direction::ToSource, '←')] {
                if kind.travels(channel, direction) {
                    places += &format!("{c}{d} ");
                }
            }
        }
        let row = format!("| {} | `{kind}` | {}|", kind.byte(), places);
        let found =
            DOCUMENT.lines().find(|line| line.starts_with(&format!("| {} | `{kind}` |", kind.byte())));
        assert!(found.is_some_and(|line| line.starts_with(&row)), "expected a row {row}, found {found:?}");
    }
}
