use super::*;
use crate::pipe::{memory_link, pipe_pair};

const LENGTH: usize = 1000;

fn bytes() -> Vec<u8> {
    (0..LENGTH).map(|i| (i % 251) as u8).collect()
}

/// What arrives when [`bytes`] go through a plan, in pieces of this size, and how many faults happened.
fn through(plan: FaultPlan, piece: usize) -> (Vec<u8>, io::Result<()>, usize) {
    let (ours, mut theirs) = pipe_pair().unwrap();
    let mut faulty = FaultyStream::new(Box::new(ours), plan);
    // Single bytes fill a socket's buffer quickly, so somebody has to read at the same time.
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).unwrap();
        got
    });
    let sent = bytes().chunks(piece).try_for_each(|chunk| faulty.write_all(chunk));
    // The peer may have seen the end already.
    let _ = faulty.inner.shutdown();
    let got = reader.join().unwrap();
    (got, sent, faulty.fired())
}

/// The same for reading.
fn back(plan: FaultPlan, piece: usize) -> (Vec<u8>, io::Result<()>, usize) {
    let (ours, mut theirs) = pipe_pair().unwrap();
    let mut faulty = FaultyStream::new(Box::new(ours), plan);
    theirs.write_all(&bytes()).unwrap();
    theirs.shutdown().unwrap();
    let (mut got, mut buf) = (Vec::new(), vec![0; piece]);
    let result = loop {
        match faulty.read(&mut buf) {
            Ok(0) => break Ok(()),
            Ok(count) => got.extend_from_slice(&buf[..count]),
            Err(error) => break Err(error),
        }
    };
    (got, result, faulty.fired())
}

/// Both directions, whole and in awkward pieces, must deliver `expected`.
fn check(at: u64, kind: FaultKind, expected: &[u8], fails: bool) {
    for piece in [1, 7, 64, LENGTH] {
        let (got, result, fired) = through(FaultPlan::none().on_write(at, kind.clone()), piece);
        assert_eq!(
            (&got[..], result.is_err(), fired),
            (expected, fails, 1),
            "writing pieces of {piece}: {kind:?}"
        );
        let (got, result, fired) = back(FaultPlan::none().on_read(at, kind.clone()), piece);
        assert_eq!(
            (&got[..], result.is_err(), fired),
            (expected, fails, 1),
            "reading pieces of {piece}: {kind:?}"
        );
    }
}

#[test]
fn no_plan_changes_nothing() {
    for piece in [1, 100, LENGTH] {
        assert_eq!(through(FaultPlan::none(), piece).0, bytes());
        assert_eq!(back(FaultPlan::none(), piece).0, bytes());
    }
}

#[test]
fn faults_hit_the_byte_they_name() {
    let plain = bytes();
    check(500, FaultKind::Cut, &plain[..500], true);
    check(500, FaultKind::Truncate, &plain[..500], false);
    check(0, FaultKind::Truncate, &[], false);
    let mut flipped = plain.clone();
    flipped[333] ^= 1 << 5;
    check(333, FaultKind::FlipBit(5), &flipped, false);
    check(10, FaultKind::Stall(Duration::from_millis(1)), &plain, false);
    check(990, FaultKind::Slow(Duration::from_micros(1)), &plain, false);
    check(20, FaultKind::Insert(b"junk".to_vec()), &[&plain[..20], b"junk", &plain[20..]].concat(), false);
    check(20, FaultKind::Skip(300), &[&plain[..20], &plain[320..]].concat(), false);
    check(20, FaultKind::Duplicate(300), &[&plain[..320], &plain[20..]].concat(), false);
}

#[test]
fn several_faults_happen_in_order() {
    let plain = bytes();
    let plan = FaultPlan::none()
        .on_write(900, FaultKind::Cut)
        .on_write(0, FaultKind::Insert(b"a".to_vec()))
        .on_write(0, FaultKind::Insert(b"b".to_vec()))
        .on_write(100, FaultKind::Skip(50))
        .on_write(120, FaultKind::Insert(b"late".to_vec()));
    let (got, result, fired) = through(plan, 64);
    assert_eq!(got, [b"ab", &plain[..100], b"late", &plain[150..900]].concat());
    assert!(result.is_err());
    assert_eq!(fired, 5);
}

#[test]
fn a_cut_ends_both_directions_of_every_handle() {
    let (ours, mut theirs) = pipe_pair().unwrap();
    let mut faulty = FaultyStream::new(Box::new(ours), FaultPlan::none().on_write(3, FaultKind::Cut));
    let mut clone = faulty.try_clone_stream().unwrap();
    assert!(faulty.write_all(b"12345").is_err());
    assert!(clone.read(&mut [0; 1]).is_err());
    assert!(clone.write(b"x").is_err());
    let mut got = Vec::new();
    theirs.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"123");
}

#[test]
fn a_stall_ends_with_the_timeout_or_the_shutdown() {
    let hour = FaultKind::Stall(Duration::from_secs(3600));
    let (ours, _theirs) = pipe_pair().unwrap();
    let mut faulty =
        FaultyStream::new(Box::new(ours), FaultPlan::none().on_write(0, hour.clone()).on_read(0, hour));
    faulty.set_timeouts(Some(Duration::from_millis(1)), Some(Duration::from_millis(1))).unwrap();
    assert_eq!(faulty.write(b"x").unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(faulty.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(faulty.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    faulty.set_timeouts(None, None).unwrap();
    let handle = faulty.try_clone_stream().unwrap();
    let reader = std::thread::spawn(move || faulty.read(&mut [0; 1]).unwrap_err().kind());
    handle.shutdown().unwrap();
    assert_eq!(reader.join().unwrap(), io::ErrorKind::ConnectionReset);
}

#[test]
fn the_plan_belongs_to_the_kth_connection() {
    let (connector, acceptor) = memory_link();
    let faults =
        ConnectionFaults::new().plan(1, FaultPlan::none().on_write(0, FaultKind::FlipBit(0))).refuse(2);
    let connector = FaultyConnector::new(connector, faults.clone());
    let accepting = ConnectionFaults::new().plan(0, FaultPlan::none().on_read(1, FaultKind::Truncate));
    let acceptor = FaultyAcceptor::new(acceptor, accepting.clone());
    let mut got = Vec::new();
    for _ in 0..2 {
        let mut ours = connector.connect().unwrap();
        let mut theirs = acceptor.accept(Duration::from_secs(5)).unwrap();
        ours.write_all(&[4, 6]).unwrap();
        ours.shutdown().unwrap();
        let mut bytes = Vec::new();
        theirs.read_to_end(&mut bytes).unwrap();
        got.push(bytes);
    }
    assert_eq!(got, [vec![4], vec![5, 6]]);
    assert_eq!(connector.connect().err().unwrap().kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!((faults.fired(), accepting.fired()), (2, 1));
}

#[test]
fn seeded_plans_are_reproducible_and_of_every_kind() {
    let plans: Vec<FaultPlan> = (0..200).map(|seed| FaultPlan::seeded(seed, 500)).collect();
    assert_eq!(plans, (0..200).map(|seed| FaultPlan::seeded(seed, 500)).collect::<Vec<_>>());
    let kinds: std::collections::HashSet<_> = plans
        .iter()
        .flat_map(|p| p.reads.iter().chain(&p.writes))
        .map(|(_, kind)| std::mem::discriminant(kind))
        .collect();
    assert_eq!(kinds.len(), 7);
    for plan in plans {
        let fired = through(plan.clone(), 64).2 + back(plan, 64).2;
        assert_eq!(fired, 1);
    }
}
