//! The end that opens connections, and opens them again.

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::{
    Connector, Interruptions, Outage, SPEAKS_TLS, Stream, Untrusted, random_session, speaks_tls,
};
use tracing::debug;

use super::frame::{ANSWER_LEN, Answer, Opening, Token, Wish, invalid};
use super::limit::Limit;
use super::stream::{Counts, Inner, LastingStream, Role, is_untrusted};
use super::{GREETING, MAX_PATIENCE};

/// Pauses between attempts: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// A host that is there and refuses connections for so long has no destination any more.
const REFUSED: Duration = Duration::from_secs(3);
/// What an error is that comes of the other end's having given the connection up.
pub(super) const GIVEN_UP: ErrorKind = ErrorKind::ConnectionAborted;
/// How long the destination may take to hear that everything is over.
const ABANDON: Duration = Duration::from_secs(1);
/// How often connections are looked at that nobody may be using.
const KEEP: Duration = Duration::from_millis(100);
/// How often somebody who pauses looks whether he should stop.
const LOOK: Duration = Duration::from_millis(50);

/// Opens connections that outlast a loss of the network.
pub struct LastingConnector {
    opener: Arc<Opener>,
    current: Mutex<Option<Group>>,
}

/// The connections of a migration.
#[derive(Clone)]
struct Group {
    name: [u8; 14],
    next: Arc<AtomicU16>,
    /// Each connection has a share.
    open: Arc<()>,
    counts: Arc<Counts>,
    /// Connections that have not been closed here.
    unclosed: Arc<AtomicUsize>,
    /// The other end could not be told of all that were.
    is_untold: Arc<AtomicBool>,
    kept: Arc<Mutex<Kept>>,
}

/// Connections that are looked at now and then: one that nobody reads or writes would be found broken by nobody.
#[derive(Default)]
struct Kept {
    all: Vec<Weak<Inner>>,
    has_keeper: bool,
}

impl Kept {
    fn add(kept: &Arc<Mutex<Kept>>, inner: &Arc<Inner>) -> io::Result<()> {
        let mut inside = lock(kept);
        inside.all.push(Arc::downgrade(inner));
        if !inside.has_keeper {
            let keeping = kept.clone();
            thread::Builder::new().name("keep".into()).spawn(move || while Kept::look(&keeping) {})?;
            inside.has_keeper = true;
        }
        Ok(())
    }

    /// Looks at all, after a while. `false`: there are none left.
    fn look(kept: &Mutex<Kept>) -> bool {
        thread::sleep(KEEP);
        let all: Vec<_> = {
            let mut kept = lock(kept);
            kept.all.retain(|inner| inner.strong_count() > 0);
            let all: Vec<_> = kept.all.iter().filter_map(Weak::upgrade).collect();
            // Whether this one goes on, for exactly the same reason.
            kept.has_keeper = !all.is_empty();
            all
        };
        // It waits for a broken one, and so mends it.
        for inner in all.iter() {
            let _ = inner.is_hung_up();
        }
        !all.is_empty()
    }
}

/// Opens connections below lasting ones.
pub(super) struct Opener {
    below: Arc<dyn Connector>,
    limit: Limit,
}

impl LastingConnector {
    /// Connections made by `below`, which may be broken for as long as `patience`.
    pub fn new(below: Arc<dyn Connector>, patience: Duration) -> LastingConnector {
        let limit = Limit::new(patience.min(MAX_PATIENCE));
        LastingConnector { opener: Arc::new(Opener { below, limit }), current: Mutex::new(None) }
    }

    /// The connections that a new one belongs to. A migration begins when none of the last one is left.
    fn group(&self) -> io::Result<Group> {
        let mut current = lock(&self.current);
        if let Some(group) = &*current
            && Arc::strong_count(&group.open) > 1
        {
            return Ok(group.clone());
        }
        let random = random_session().map_err(io::Error::other)?;
        let mut name = [0; 14];
        name.copy_from_slice(&random[..14]);
        self.limit_outage(None);
        let group = Group {
            name,
            next: Arc::default(),
            open: Arc::default(),
            counts: Arc::default(),
            unclosed: Arc::default(),
            is_untold: Arc::default(),
            kept: Arc::default(),
        };
        Ok(current.insert(group).clone())
    }

    fn open(&self, go_on: &dyn Fn() -> bool) -> io::Result<Box<dyn Stream>> {
        let group = self.group()?;
        let since = Instant::now();
        let (mut pauses, mut refusals) = (Pauses::default(), Refusals::default());
        loop {
            let number = group.next.fetch_add(1, SeqCst);
            let is_first = number == 0;
            match self.attempt(&group, Token { group: group.name, number }, go_on) {
                // The network may be lost between two connections of a migration as well.
                Err(error)
                    if !is_first
                        && !is_untrusted(&error)
                        && error.kind() != ErrorKind::InvalidData
                        && since.elapsed() < self.opener.patience()
                        && !refusals.are_final(&error)
                        && go_on() =>
                {
                    debug!(%error, "tried again");
                    pauses.next(go_on);
                }
                other => return other,
            }
        }
    }

    fn attempt(&self, group: &Group, token: Token, go_on: &dyn Fn() -> bool) -> io::Result<Box<dyn Stream>> {
        let mut below = self.opener.below.connect_while(go_on)?;
        let opening = Opening { wish: Wish::Open, token, patience: self.opener.limit.most() };
        let Answer::Go { received: 0, patience } = ask(&mut *below, &opening, GREETING, go_on)? else {
            return Err(invalid("an answer to a new connection as if it were an old one".into()));
        };
        let role = Role::Opens(self.opener.clone());
        let patience = patience.min(self.opener.limit.most());
        let inner = Arc::new(Inner::new(token, role, self.peer(), patience, group.counts.clone(), below)?);
        let opener = self.opener.clone();
        let (group, is_closed) = (group.clone(), AtomicBool::new(false));
        group.unclosed.fetch_add(1, SeqCst);
        let kept = group.kept.clone();
        let stream = LastingStream::new(inner.clone(), move |told| {
            // All of it, its share of the group as well: a closure takes no more than it names.
            let group = &group;
            if is_closed.swap(true, SeqCst) {
                return;
            }
            if !told {
                group.is_untold.store(true, SeqCst);
            }
            // Not before the last one: over the others there may still be something to say, such as why.
            if group.unclosed.fetch_sub(1, SeqCst) == 1 && group.is_untold.swap(false, SeqCst) {
                opener.abandon(token);
            }
        });
        Kept::add(&kept, &inner)?;
        Ok(Box::new(stream))
    }
}

impl Connector for LastingConnector {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        self.open(&|| true)
    }

    fn connect_while(&self, go_on: &dyn Fn() -> bool) -> io::Result<Box<dyn Stream>> {
        self.open(go_on)
    }

    fn opens_bare(&self) -> bool {
        self.opener.below.opens_bare()
    }

    fn connect_bare(&self, go_on: &dyn Fn() -> bool) -> io::Result<Box<dyn Stream>> {
        // The acceptor takes ordinary connections as well.
        self.opener.below.connect_bare(go_on)
    }

    fn peer(&self) -> String {
        self.opener.below.peer()
    }

    fn limit_outage(&self, most: Option<Duration>) {
        self.opener.limit.set(most);
    }

    fn interruptions(&self) -> Interruptions {
        lock(&self.current).as_ref().map(|group| group.counts.get()).unwrap_or_default()
    }

    fn outage(&self) -> Option<Outage> {
        let kept = lock(&self.current).as_ref().map(|group| group.kept.clone())?;
        let all: Vec<_> = lock(&kept).all.iter().filter_map(Weak::upgrade).collect();
        all.iter().filter_map(|inner| inner.outage()).max_by_key(|outage| outage.lasts)
    }

    fn renew(&self) {
        self.opener.below.renew();
    }
}

impl Opener {
    pub(super) fn patience(&self) -> Duration {
        self.limit.get()
    }

    /// Opens a connection to go on with a broken one, of which this end has `received` bytes; tries until it is of no use, or nobody wants it any more (`None`).
    /// Returns it, and how many bytes the other end has.
    pub(super) fn resume(
        &self,
        token: Token,
        received: u64,
        identity: &Option<Arc<str>>,
        is_wanted: &dyn Fn() -> bool,
    ) -> io::Result<Option<(Box<dyn Stream>, u64)>> {
        let opening = Opening { wish: Wish::Resume { received }, token, patience: self.limit.most() };
        let (mut pauses, mut refusals) = (Pauses::default(), Refusals::default());
        while is_wanted() {
            let attempt = self.below.connect_while(is_wanted).and_then(|mut below| {
                if &below.peer_identity() != identity {
                    let name = |identity: &Option<Arc<str>>| identity.as_deref().unwrap_or("nobody known").to_owned();
                    let what = format!(
                        "the connection broke, and {} is somebody else than before: its certificate is that of {} now, and was that of {}",
                        self.below.peer(),
                        name(&below.peer_identity()),
                        name(identity)
                    );
                    return Err(Untrusted(what).into());
                }
                let answer = ask(&mut *below, &opening, GREETING, is_wanted)?;
                Ok((below, answer))
            });
            match attempt {
                Ok((below, Answer::Go { received, .. })) => return Ok(Some((below, received))),
                Ok((_, Answer::Over)) => {
                    return Err(io::Error::new(
                        GIVEN_UP,
                        "the connection broke, and the destination has given the migration up",
                    ));
                }
                Err(error) if is_untrusted(&error) || error.kind() == ErrorKind::InvalidData => {
                    return Err(error);
                }
                Err(error) => {
                    debug!(%error, "not mended yet");
                    if refusals.are_final(&error) {
                        return Err(io::Error::new(
                            ErrorKind::ConnectionRefused,
                            "the connection broke, and nobody listens at the destination any more",
                        ));
                    }
                }
            }
            pauses.next(is_wanted);
        }
        Ok(None)
    }

    /// Tells the destination that everything is over, so that it need not wait for a connection to be mended.
    fn abandon(&self, token: Token) {
        let since = Instant::now();
        let in_time = || since.elapsed() < ABANDON;
        let opening = Opening { wish: Wish::Abandon, token, patience: Duration::ZERO };
        let told = self.below.connect_while(&in_time);
        let told = told.and_then(|mut below| ask(&mut *below, &opening, ABANDON, &in_time));
        if let Err(error) = told {
            debug!(%error, "the destination may not know that it is over");
        }
    }
}

/// Pauses between attempts, each longer than the last.
#[derive(Default)]
struct Pauses(Option<Duration>);

impl Pauses {
    /// Waits for the next one to be over, while that is wanted.
    fn next(&mut self, is_wanted: &dyn Fn() -> bool) {
        let pause = self.0.map_or(PAUSE.0, |last| (2 * last).min(PAUSE.1));
        self.0 = Some(pause);
        let until = Instant::now() + pause;
        while is_wanted() && Instant::now() < until {
            thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
        }
    }
}

/// Since when the host has refused connections, if it has all the time.
#[derive(Default)]
struct Refusals(Option<Instant>);

impl Refusals {
    /// Whether it was asked often enough, after an attempt that came to this.
    fn are_final(&mut self, error: &io::Error) -> bool {
        if error.kind() != ErrorKind::ConnectionRefused {
            self.0 = None;
            return false;
        }
        self.0.get_or_insert_with(Instant::now).elapsed() > REFUSED
    }
}

/// Sends the first bytes of a connection and waits for the answer.
fn ask(
    below: &mut dyn Stream,
    opening: &Opening,
    patience: Duration,
    go_on: &dyn Fn() -> bool,
) -> io::Result<Answer> {
    below.set_timeouts(Some(patience), Some(patience))?;
    below.write_all(&opening.encode())?;
    below.flush()?;
    let until = Instant::now() + patience;
    let mut answer = [0; ANSWER_LEN];
    let mut len = 0;
    while len < ANSWER_LEN {
        // However it comes: one that drips is none. What is there is read without waiting.
        let is_there = below.wait_readable(LOOK)?;
        if !go_on() || Instant::now() >= until {
            return Err(io::Error::new(ErrorKind::TimedOut, "no answer to a new connection"));
        }
        if !is_there {
            continue;
        }
        match below.read(&mut answer[len..])? {
            0 if speaks_tls(&answer[..len]) => return Err(Untrusted(SPEAKS_TLS.to_owned()).into()),
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n => len += n,
        }
    }
    Answer::decode(&answer)
}
