//! `graph`: PageRank over a graph in compressed sparse rows.
//!
//! The graph never changes: an array of 64-bit offsets and an array of 32-bit neighbours. The values do:
//! every sweep over the vertices first writes each one's contribution (score / degree), then each one's new
//! score from the contributions of its neighbours, all as 32-bit floats. The jump term wanders by up to 1 %
//! from sweep to sweep, as if the query changed, so the values move but never settle.
//!
//! Every page has its checksum in a table of its own, kept up to date as pages of values are completed. Old
//! pages are found out like damaged ones.

use super::sum::Sum;
use super::{Corruption, Plan, Step, Verified, Workload};
use crate::rng::{Rng, mix};

const PAGE: usize = 4096;
/// Values in a page.
const BLOCK: usize = PAGE / 4;
/// Vertices that get their new score in one step: about a thousand random reads.
const STRIDE: usize = 64;
const LARGEST_DEGREE: u64 = 2048;
const DAMPING: f32 = 0.85;

pub struct Graph<'m> {
    mem: &'m mut [u8],
    places: Places,
    /// Vertices whose values are rewritten: the first ones.
    active: usize,
    phase: Phase,
    /// Next vertex.
    vertex: usize,
    /// Values of the page in progress. They go to memory all at once, so that every page has a checksum at
    /// any time.
    pending: [f32; BLOCK],
    sweeps: u64,
    seed: u64,
    cursor: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Contributions,
    Scores,
}

/// Where the arrays start, in bytes; all at page boundaries. Offsets are at 0.
struct Places {
    vertices: usize,
    edges: usize,
    scores: usize,
    contributions: usize,
    sums: usize,
}

impl Places {
    fn new(vertices: usize, edges: u64) -> Places {
        let edges_at = ((vertices + 1) * 8).next_multiple_of(PAGE);
        let scores = (edges_at + edges as usize * 4).next_multiple_of(PAGE);
        let contributions = (scores + vertices * 4).next_multiple_of(PAGE);
        let sums = (contributions + vertices * 4).next_multiple_of(PAGE);
        Places { vertices, edges: edges_at, scores, contributions, sums }
    }

    fn end(&self) -> usize {
        self.sums + self.sums / PAGE * 4
    }
}

impl<'m> Graph<'m> {
    /// Fills memory.
    pub fn new(mem: &'m mut [u8], plan: Plan) -> Self {
        let budget = plan.filled.min(mem.len() / PAGE) * PAGE;
        let places = fit(budget, plan.seed);
        // The working set is made of scores and contributions.
        let active = places.vertices.min(plan.working_set * PAGE / 8);
        let mut graph = Graph {
            mem,
            places,
            active,
            phase: Phase::Contributions,
            vertex: 0,
            pending: [0.0; BLOCK],
            sweeps: 0,
            seed: plan.seed,
            cursor: 0,
        };
        graph.fill();
        graph
    }

    fn fill(&mut self) {
        let vertices = self.places.vertices;
        let mut rng = Rng::new(self.seed);
        let mut edge = 0u64;
        for v in 0..vertices {
            self.mem[v * 8..v * 8 + 8].copy_from_slice(&edge.to_le_bytes());
            let degree = degree(v, self.seed);
            let share = (1 << 32) / degree;
            for k in 0..degree {
                // One neighbour from each share of the vertices, so that they come sorted. The square prefers
                // low numbers: they are the hubs.
                let x = k * share + (((rng.next_u64() >> 32) * share) >> 32);
                let neighbour = (((x * x) >> 32) * vertices as u64) >> 32;
                let at = self.places.edges + edge as usize * 4;
                self.mem[at..at + 4].copy_from_slice(&(neighbour as u32).to_le_bytes());
                edge += 1;
            }
            self.put(self.places.scores + v * 4, 1.0 / vertices as f32);
        }
        self.mem[vertices * 8..vertices * 8 + 8].copy_from_slice(&edge.to_le_bytes());
        for page in 0..self.places.sums / PAGE {
            self.seal(page);
        }
    }

    fn offset(&self, v: usize) -> usize {
        u64::from_le_bytes(*self.mem[v * 8..].first_chunk().expect("inside the offsets")) as usize
    }

    fn float(&self, at: usize) -> f32 {
        f32::from_le_bytes(*self.mem[at..].first_chunk().expect("inside the values"))
    }

    fn put(&mut self, at: usize, value: f32) {
        self.mem[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn neighbours(&self, v: usize) -> core::ops::Range<usize> {
        self.offset(v)..self.offset(v + 1)
    }

    fn sum_of(&self, page: usize) -> u32 {
        let mut sum = Sum::new();
        sum.add_bytes(&self.mem[page * PAGE..(page + 1) * PAGE]);
        sum.finish()
    }

    /// Notes the checksum of a page that is complete.
    fn seal(&mut self, page: usize) {
        let at = self.places.sums + page * 4;
        let sum = self.sum_of(page);
        self.mem[at..at + 4].copy_from_slice(&sum.to_le_bytes());
    }

    fn score(&self, v: usize, jump: f32) -> Result<f32, Corruption> {
        let edges = self.places.edges;
        let mut total = 0.0;
        for e in self.neighbours(v) {
            // Damaged offsets and neighbours must not lead outside the arrays.
            let at = edges + e * 4;
            let wild = |expected, found| Corruption { at: v * 8, what: "wild-edge", expected, found };
            if at + 4 > self.places.scores {
                return Err(wild(self.places.scores as u64, at as u64));
            }
            let neighbour = u32::from_le_bytes(*self.mem[at..].first_chunk().expect("checked")) as usize;
            if neighbour >= self.places.vertices {
                return Err(wild(self.places.vertices as u64, neighbour as u64));
            }
            total += self.float(self.places.contributions + neighbour * 4);
        }
        Ok(jump + DAMPING * total)
    }
}

/// Degrees follow a power law (Pareto, exponent 2) with a mean of 16.
fn degree(v: usize, seed: u64) -> u64 {
    let u = mix(v as u64 ^ seed << 32) >> 32 | 1;
    ((8 << 16) / u.isqrt()).clamp(1, LARGEST_DEGREE)
}

/// As many vertices as fit.
fn fit(budget: usize, seed: u64) -> Places {
    let mut places = Places { vertices: 0, edges: 0, scores: 0, contributions: 0, sums: 0 };
    let mut edges = 0;
    // Neighbours are 32-bit numbers.
    for v in 0..u32::MAX as usize {
        edges += degree(v, seed);
        let larger = Places::new(v + 1, edges);
        if larger.end() > budget {
            break;
        }
        places = larger;
    }
    places
}

impl Workload for Graph<'_> {
    fn step(&mut self, _now_ms: u64, found: &mut dyn FnMut(Corruption)) -> Step {
        if self.active == 0 {
            return Step::default();
        }
        let from = self.vertex;
        let (array, stride) = match self.phase {
            Phase::Contributions => (self.places.contributions, BLOCK),
            Phase::Scores => (self.places.scores, STRIDE),
        };
        let to = (from + stride).min(self.active);
        let wander = 0.995 + (mix(self.sweeps ^ self.seed) % 1024) as f32 / 102_400.0;
        let jump = (1.0 - DAMPING) / self.places.vertices as f32 * wander;
        for v in from..to {
            let value = match self.phase {
                Phase::Contributions => {
                    self.float(self.places.scores + v * 4) / self.neighbours(v).len().max(1) as f32
                }
                Phase::Scores => self.score(v, jump).unwrap_or_else(|corruption| {
                    found(corruption);
                    0.0
                }),
            };
            self.pending[v % BLOCK] = value;
        }
        self.vertex = to;
        let block_done = to.is_multiple_of(BLOCK) || to == self.active;
        if block_done {
            let first = (to - 1) / BLOCK * BLOCK;
            for v in first..to {
                self.put(array + v * 4, self.pending[v - first]);
            }
            self.seal((array + first * 4) / PAGE);
        }
        if to == self.active {
            self.vertex = 0;
            if self.phase == Phase::Scores {
                self.sweeps += 1;
                self.phase = Phase::Contributions;
            } else {
                self.phase = Phase::Scores;
            }
        }
        Step { ops: (to - from) as u64, pages: u64::from(block_done) }
    }

    fn verify(&mut self, found: &mut dyn FnMut(Corruption)) -> Verified {
        let page = self.cursor;
        if page >= self.places.sums / PAGE {
            self.cursor = 0;
            return Verified { bytes: 0, sweep_done: true };
        }
        self.cursor += 1;
        let at = self.places.sums + page * 4;
        let expected = u32::from_le_bytes(*self.mem[at..].first_chunk().expect("inside the sums"));
        let sum = self.sum_of(page);
        if sum != expected {
            found(Corruption {
                at: page * PAGE,
                what: "page-sum",
                expected: u64::from(expected),
                found: u64::from(sum),
            });
        }
        Verified { bytes: PAGE as u64, sweep_done: false }
    }

    #[cfg(test)]
    fn flip(&mut self, at: usize, bits: u8) -> u8 {
        self.mem[at] ^= bits;
        self.mem[at]
    }
}
