//! Writes inputs from which fuzzers start, made by the product: what they would hardly find by themselves. `scripts/fuzz-corpus.sh` runs it.
#![cfg(not(miri))]

use std::fs;
use std::io::Read;
use std::path::Path;

use pagewarp_codec::{Encoding, EncodingSet, Page, PageEncoder, Simd, container};
use pagewarp_wire::{
    Accept, Ack, BatchView, ErrorCode, FrameWriter, HEADER_LEN, Hello, Message, NO_SLOT, Role, fuzzing,
};

fn write(target: &str, number: usize, input: &[u8]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/target/corpus").join(target);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join(format!("seed-{number}")), input).unwrap();
}

fn write_all(target: &str, inputs: impl IntoIterator<Item = Vec<u8>>) {
    for (number, input) in inputs.into_iter().enumerate() {
        write(target, number, &input);
    }
}

#[test]
#[ignore = "writes files"]
fn write_seeds() {
    codec();
    wire();
    kvm();
    net();
    qemu();
}

fn codec() {
    let mut sparse = Page::ZERO;
    (0..40).for_each(|at| sparse.0[at * 97] = at as u8 + 1);
    let text = Page(std::array::from_fn(|at| b"the quick brown fox "[(at + at / 999) % 20]));
    let base = Page([0x33; 4096]);
    let image = [&Page::ZERO.0[..], &sparse.0, &text.0].concat();
    for (number, mut base) in [None, Some(&[0x33u8; 3 * 4096][..])].into_iter().enumerate() {
        let base = base.as_mut().map(|base| base as &mut dyn Read);
        let mut container = Vec::new();
        container::write(&mut &image[..], base, 3, Simd::Scalar, EncodingSet::ALL, &mut container).unwrap();
        write("codec_container", number, &container);
    }
    for (number, (page, encoding)) in [&sparse, &text]
        .into_iter()
        .flat_map(|page| Encoding::ALL.map(|encoding| (page, encoding)))
        .enumerate()
    {
        let mut payload = Vec::new();
        let allowed = EncodingSet::of(&[encoding, Encoding::Raw]);
        let used = PageEncoder::new(Simd::Scalar, allowed).expect("every machine has it").encode(
            page,
            Some(&base),
            &mut payload,
        );
        if payload.len() < 1000 {
            write("codec_page", number, &[&[used.tag(), 0x33], &payload[..]].concat());
            write("codec_encode", number, &[&[0x7f], &page.0[..300], &base.0[..300]].concat());
        }
    }
}

fn wire() {
    let messages = [
        Message::Hello(Hello::new(Role::Control, [7; 16])),
        Message::HelloAck { version: 1 },
        Message::Offer(fuzzing::offer()),
        Message::Accept(Accept { encodings: 0x7f, history_slots: 0, max_batch_pages: 256 }),
        Message::EpochStart { epoch: 0, pages: 7 },
        Message::Ack(Ack { batches: 1, wire_bytes: 2, pages: 3 }),
        Message::DeviceState { total_len: 3, offset: 0, bytes: b"abc".to_vec() },
        Message::Prepare { epoch: 0, state_len: 3, state_hash: 1 },
        Message::Running { report: b"{\"total_ms\":1.5}".to_vec() },
        Message::Digests { region: 3, first_page: 0, digests: vec![1, 2, 3] },
        Message::Error { code: ErrorCode::Vm, message: "no".into() },
        Message::Damaged { epoch: 0, region: 3, pages: vec![1, 2], reason: "it differs".into() },
    ];
    let mut writer = FrameWriter::new();
    let mut stream = vec![0];
    for (number, message) in messages.iter().enumerate() {
        let mut frame = Vec::new();
        FrameWriter::new().control(message, &mut frame).unwrap();
        write("wire_frame", number, &[&[1, message.kind().byte()], &frame[HEADER_LEN..]].concat());
        writer.control(message, &mut stream).unwrap();
    }
    write("wire_frame", messages.len(), &stream);
    for (number, slots) in [&[][..], &[5, NO_SLOT, 999]].into_iter().enumerate() {
        let batch = BatchView {
            region: 3,
            epoch: 1,
            plain_hash: 7,
            pages: &[1, 2, 400],
            tags: &[0, 2, 3],
            lens: &[0, 4096, 17],
            slots,
        };
        let mut frame = Vec::new();
        FrameWriter::new().batch_prefix(&batch, 4113, &mut frame).unwrap();
        write("wire_batch_meta", number, &[&[number as u8], &frame[HEADER_LEN..]].concat());
    }
    // Hardly anything is said in the order in which it may be: these get far.
    write("wire_session", 0, &[[0, 0, 5, 1], [0, 0, 0, 10], [0, 1, 0, 8], [0, 0, 3, 9]].concat());
    write("wire_session", 1, &[[1, 0, 10, 0], [0, 0, 0, 4], [0, 7, 0, 0], [6, 0, 0, 0]].concat());
}

fn kvm() {
    let machine = br#"{"version":1,"memory_bytes":67108864,"vcpus":2,"tsc_khz":2000000,"cpuid":[
        {"function":1,"index":0,"flags":0,"eax":1,"ebx":2,"ecx":3,"edx":4},
        {"function":13,"index":1,"flags":1,"eax":1,"ebx":2,"ecx":3,"edx":4}]}"#;
    write("kvm_machine", 0, machine);
    write("kvm_state", 0, &[&[0], &pagewarp_kvm::fuzzing::sample_state(1)[..]].concat());
    let requests = [
        r#"{"request":"status"}"#,
        r#"{"request":"migrate","to":"host:1","options":{"connections":4,"max_time_ms":5,"backend":"cpu","tls_dir":"/x"}}"#,
        r#"{"request":"console","lines":10}"#,
        r#"{"request":"resolve","resume":true}"#,
        r#"{"event":"ok"}"#,
        r#"{"event":"error","code":"busy","message":"later"}"#,
        r#"{"event":"console","lines":["a","b"]}"#,
        r#"{"event":"status","name":"vm","state":"running","pid":1,"memory_bytes":1,"vcpus":1,"uptime_ms":1.5,"serial_lines":0,"serial_bytes":0,"listening":null,"progress":null}"#,
    ];
    write_all("kvm_control", requests.map(|line| line.as_bytes().to_vec()));
}

fn net() {
    let names = [&["host.example", "10.0.0.1", "*.other.example"][..], &["one"]];
    let certificates = names.map(|names| {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let certified = rcgen::generate_simple_self_signed(names).unwrap();
        [&[0], certified.cert.der().as_ref()].concat()
    });
    let words = [&[1, 0][..], &[1, 1, 3, 0, b'n', b'o', 7]].map(<[u8]>::to_vec);
    write_all("net_tls", certificates.into_iter().chain(words));
    let opening = [&b"\0PWLK\x01\x01\0\0fourteen bytes\x07\0\x09"[..], &[0; 15]].concat();
    let answer = [&b"\0PWLK\x01\0\0\0"[..], &[7; 12], &[0; 4]].concat();
    let pieces = [[0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]].concat();
    write_all("net_stream", [opening, answer, pieces]);
}

fn qemu() {
    let conversation = br#"{"event": "MIGRATION", "data": {"status": "active"}, "timestamp": {"seconds": 1, "microseconds": 2}}
<{"status": "running", "running": true}
<{"status": "completed", "total-time": 5, "downtime": 1, "ram": {"transferred": 1, "remaining": 2, "total": 3, "page-size": 4096, "mbps": 1.5}}
<[{"capability": "events", "state": true}, {"capability": "return-path", "state": false}, {"capability": "multifd", "state": true}, {"capability": "pause-before-switchover", "state": false}]
<{"max-bandwidth": 0, "multifd-compression": "none", "tls-creds": ""}
<{}
<{}
<{}
<{}
<{"name": "vm"}
<{"UUID": "0"}
<{"base-memory": 1, "plugged-memory": 2}
<[{"thread-id": 7}]
{"id": 12, "error": {"class": "GenericError", "desc": "no"}}
"#;
    for mode in 0..4 {
        let input = [&[mode], &conversation[..]].concat();
        let incoming = String::from_utf8(input.clone()).unwrap().replace("running\"", "inmigrate\"");
        write("qemu_qmp", mode.into(), if mode < 2 { &input } else { incoming.as_bytes() });
    }
    let messages = [
        r#"{"message":"prepare","name":"vm","uuid":"0","qemu_version":"8.2.0","multifd":4,"was_running":true}"#,
        r#"{"message":"prepared"}"#,
        r#"{"message":"commit","run":true}"#,
        r#"{"message":"running","resumed_at_us":7}"#,
        r#"{"message":"failed","reason":"no \u001b[31m room"}"#,
        r#"{"message":"report","qemu_version":"8.2.0","qemu_cpu_ms":1.5,"bridge":null}"#,
    ];
    write_all("qemu_control", messages.map(|message| message.as_bytes().to_vec()));
}
