use serde_json::json;

use super::*;

/// The capabilities of a version that matter here, all off.
fn capabilities(version: Version) -> BTreeMap<String, bool> {
    let since =
        |minimum: Version, names: &[&'static str]| if version >= minimum { names.to_vec() } else { vec![] };
    let until =
        |limit: Version, names: &[&'static str]| if version < limit { names.to_vec() } else { vec![] };
    let always = [
        "xbzrle",
        "rdma-pin-all",
        "auto-converge",
        "events",
        "postcopy-ram",
        "x-colo",
        "return-path",
        "pause-before-switchover",
        "late-block-activate",
        "multifd",
        "x-ignore-shared",
        "background-snapshot",
    ];
    always
        .into_iter()
        .chain(until(Version::new(9, 1), &["compress", "block"]))
        .chain(since(Version::new(7, 1), &["zero-copy-send", "postcopy-preempt"]))
        .chain(since(Version::new(8, 1), &["switchover-ack", "dirty-limit"]))
        .chain(since(Version::new(9, 0), &["mapped-ram"]))
        .map(|name| (name.to_owned(), false))
        .collect()
}

fn seen(version: Version, state: &str) -> Seen {
    let mut parameters =
        json!({ "tls-creds": "", "multifd-compression": "none", "max-bandwidth": 134_217_728 });
    if version >= Version::new(9, 0) {
        parameters["mode"] = json!("normal");
    }
    let Value::Object(parameters) = parameters else { unreachable!() };
    Seen {
        version,
        run: RunState { status: state.to_owned(), running: state == "running" },
        migration: MigrationStatus::of(&json!({})),
        capabilities: capabilities(version),
        parameters,
    }
}

fn versions() -> impl Iterator<Item = Version> {
    [
        (6, 2),
        (7, 0),
        (7, 1),
        (7, 2),
        (8, 0),
        (8, 1),
        (8, 2),
        (9, 0),
        (9, 1),
        (9, 2),
        (10, 0),
        (10, 1),
        (10, 2),
    ]
    .map(|(major, minor)| Version::new(major, minor))
    .into_iter()
}

fn channels(n: u8) -> Option<NonZeroU8> {
    Some(NonZeroU8::new(n).unwrap())
}

#[test]
fn every_version_is_told_what_it_knows() {
    for version in versions() {
        for multifd in [None, channels(4)] {
            let wish = Wish { multifd, downtime_ms: 250, ..Wish::default() };
            let on = multifd.is_some();
            let at = |plan: &Plan, key: &str| plan.parameters.get(key).cloned();

            let plan = source(&seen(version, "running"), &wish).unwrap();
            let mut expected = BTreeMap::from([
                ("events", true),
                ("return-path", true),
                ("multifd", on),
                ("pause-before-switchover", false),
            ]);
            if version >= Version::new(7, 1) {
                expected.insert("zero-copy-send", false);
            }
            assert_eq!(plan.capabilities, expected, "{version}");
            assert_eq!(at(&plan, "max-bandwidth"), Some(json!(0)));
            assert_eq!(at(&plan, "downtime-limit"), Some(json!(250)));
            assert_eq!(at(&plan, "multifd-channels"), on.then(|| json!(4)));

            let plan = destination(&seen(version, "inmigrate"), &wish).unwrap();
            assert_eq!(
                plan.capabilities,
                BTreeMap::from([
                    ("events", true),
                    ("return-path", true),
                    ("multifd", on),
                    ("late-block-activate", true)
                ])
            );
            assert_eq!(plan.parameters.len(), usize::from(on), "{version}");
            let paused = destination(&seen(version, "inmigrate"), &Wish { run: false, ..wish }).unwrap();
            assert!(!paused.capabilities["late-block-activate"]);
        }
    }
}

#[test]
fn what_the_bridge_cannot_carry_is_refused_on_both_sides() {
    for version in versions() {
        for (capability, _) in MUST_BE_OFF {
            let expect = |result: Result<Plan, Refusal>| match result {
                Ok(_) => assert!(!capabilities(version).contains_key(capability), "{version} {capability}"),
                Err(Refusal::Capability { capability: named, .. }) => assert_eq!(named, capability),
                Err(other) => panic!("{version} {capability}: {other}"),
            };
            let mut of = seen(version, "running");
            of.capabilities.get_mut(capability).map(|on| *on = true).unwrap_or_default();
            expect(source(&of, &Wish::default()));
            of.run.status = "inmigrate".to_owned();
            expect(destination(&of, &Wish::default()));
        }
    }
}

#[test]
fn parameters_that_change_the_bytes_are_refused() {
    let multifd = Wish { multifd: channels(2), ..Wish::default() };
    let with = |key: &str, value: Value| {
        let mut of = seen(Version::new(9, 1), "running");
        of.parameters.insert(key.to_owned(), value);
        of
    };
    let creds = Refusal::Tls { creds: "tls0".to_owned() };
    assert_eq!(source(&with("tls-creds", json!("tls0")), &Wish::default()), Err(creds));
    assert!(source(&with("tls-creds", Value::Null), &Wish::default()).is_ok());
    let zstd = with("multifd-compression", json!("zstd"));
    assert_eq!(source(&zstd, &multifd), Err(Refusal::MultifdCompression { method: "zstd".to_owned() }));
    // Without multifd it has no effect.
    assert!(source(&zstd, &Wish::default()).is_ok());
    for mode in ["cpr-reboot", "cpr-transfer", "cpr-exec"] {
        assert_eq!(
            source(&with("mode", json!(mode)), &multifd),
            Err(Refusal::Mode { mode: mode.to_owned() })
        );
    }
}

#[test]
fn states_decide() {
    let version = Version { major: 7, minor: 2, micro: 22 };
    for state in ["running", "paused", "suspended", "prelaunch"] {
        assert!(source(&seen(version, state), &Wish::default()).is_ok(), "{state}");
    }
    for state in
        ["inmigrate", "postmigrate", "finish-migrate", "guest-panicked", "io-error", "colo", "anything-new"]
    {
        let refusal = source(&seen(version, state), &Wish::default()).unwrap_err();
        assert_eq!(refusal, Refusal::SourceState { state: state.to_owned() });
    }
    for state in ["running", "paused", "prelaunch"] {
        let refusal = destination(&seen(version, state), &Wish::default()).unwrap_err();
        assert_eq!(refusal, Refusal::NotIncoming { state: state.to_owned() });
        assert!(refusal.to_string().contains("-incoming defer"));
    }
}

#[test]
fn other_migrations_decide() {
    let with = |state: &str, migration: Value| Seen {
        migration: MigrationStatus::of(&migration),
        ..seen(Version::new(10, 2), state)
    };
    let wish = Wish::default();
    for status in ["setup", "active", "postcopy-device", "cancelling", "pre-switchover", "anything-new"] {
        let migration = json!({ "status": status });
        let under_way = Refusal::UnderWay { status: status.to_owned() };
        assert_eq!(source(&with("running", migration.clone()), &wish), Err(under_way));
        let listening = Refusal::AlreadyListening { status: status.to_owned() };
        assert_eq!(destination(&with("inmigrate", migration), &wish), Err(listening));
    }
    for status in ["completed", "failed", "cancelled"] {
        let migration = json!({ "status": status });
        assert!(source(&with("running", migration.clone()), &wish).is_ok(), "{status}");
        let spent = Refusal::Spent { status: status.to_owned() };
        assert_eq!(destination(&with("inmigrate", migration), &wish), Err(spent));
    }
    let listening = with("inmigrate", json!({ "socket-address": [{ "type": "unix", "path": "/x" }] }));
    assert_eq!(destination(&listening, &wish), Err(Refusal::AlreadyListening { status: "none".to_owned() }));
    let blocked = with("running", json!({ "blocked-reasons": ["VFIO device", "9p"] }));
    let refusal = source(&blocked, &wish).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "QEMU says that this VM cannot be migrated: VFIO device; 9p; remove what is named there, then try again"
    );
}

#[test]
fn impossible_wishes_are_refused() {
    let of = seen(Version::new(8, 2), "running");
    for downtime_ms in [0, MAX_DOWNTIME_MS + 1, u64::MAX] {
        assert_eq!(
            source(&of, &Wish { downtime_ms, ..Wish::default() }),
            Err(Refusal::Downtime { downtime_ms })
        );
    }
    let plan = source(&of, &Wish { pause_before_switchover: true, ..Wish::default() }).unwrap();
    assert!(plan.capabilities["pause-before-switchover"]);

    let bare = Seen { capabilities: BTreeMap::new(), ..of };
    let refusal = source(&bare, &Wish::default()).unwrap_err();
    assert_eq!(refusal, Refusal::Lacks { version: Version::new(8, 2), capability: "events" });
    let mut old = bare;
    old.capabilities.extend([("events".to_owned(), false), ("return-path".to_owned(), false)]);
    assert!(source(&old, &Wish::default()).is_ok());
    // What only makes it better is left out where it is missing.
    let incoming = Seen { run: seen(Version::new(8, 2), "inmigrate").run, ..old.clone() };
    assert!(
        !destination(&incoming, &Wish::default()).unwrap().capabilities.contains_key("late-block-activate")
    );
    let refusal = source(&old, &Wish { multifd: channels(1), ..Wish::default() }).unwrap_err();
    assert!(refusal.to_string().ends_with("migrate without --multifd"), "{refusal}");
}
