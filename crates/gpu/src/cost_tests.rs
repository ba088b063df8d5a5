//! What the kernels cost in units that do not depend on the device: bytes of device memory that they touch, and barriers, per page. The
//! table in `docs/gpu-performance.md` is made of these counts, and must be equal to them.
//!
//! Counting is done by the kernels themselves. Their sources are changed so that every index into a storage buffer or into workgroup memory
//! passes through a function that notes it, and every barrier is counted: the algorithms stay as they are.

use std::fmt::Write as _;
use std::sync::Arc;

use pagewarp_codec::{EncodedBatch, Encoding, EncodingSet, PAGE_SIZE, Page};
use pagewarp_testkit::image::{Mutation, mixed_image, mutate};
use pagewarp_testkit::rng::SplitMix64;
use wgpu::{Buffer, BufferBinding, CommandEncoder, ComputePassDescriptor};

use crate::backend::GpuConfig;
use crate::decoder::plan::Plan;
use crate::device::Gpu;
use crate::history::{LOAD, STORE};
use crate::kernels::{self, Source};
use crate::test_support::{assert_no_complaints, page_words, run, software_adapter, storage, uniform};

const PAGES: usize = 256;
const PAGE_WORDS: usize = PAGE_SIZE / 4;
/// Storage buffers of a kernel at most; bindings have these numbers, and workgroup memory has the next.
const BINDINGS: usize = 8;
const WORKGROUP: usize = BINDINGS;
/// Words of a buffer at most.
const BUFFER_WORDS: usize = PAGES * PAGE_WORDS;
/// Words of the bitmap of one buffer: a bit for each word.
const MAP_WORDS: usize = BUFFER_WORDS / 32;

/// The counter of barriers, the words asked for per binding, and the bitmaps of words touched.
const MAPS_AT: usize = 1 + BINDINGS + 1;
const COUNTER_WORDS: usize = MAPS_AT + BINDINGS * MAP_WORDS;

/// An array as the source declares it.
struct Declared {
    name: String,
    binding: usize,
    /// Of an element.
    words: usize,
}

/// Bytes and barriers of one dispatch, per page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cost {
    /// Different bytes.
    touched: usize,
    /// Bytes that threads have asked for; the same one twice counts twice.
    asked_for: usize,
    /// Accesses of threads to workgroup memory, in words.
    workgroup: usize,
    /// Barriers of a workgroup, in tenths.
    barriers: usize,
}

/// The words of an element of this type, and the word of one of its fields.
fn words_of(ty: &str) -> usize {
    match ty {
        "u32" | "atomic<u32>" => 1,
        "vec2<u32>" => 2,
        "vec4<u32>" | "PageResult" | "Entry" => 4,
        other => panic!("how large is {other}?"),
    }
}

fn word_of_field(field: &str) -> usize {
    match field {
        "tag" => 0,
        "len" => 1,
        "lz4" => 2,
        "offset" => 3,
        other => panic!("where is {other}?"),
    }
}

fn declared(source: &str) -> Vec<Declared> {
    let after = |line: &str, text: &str| line.split_once(text).expect("a declaration").1.to_owned();
    let array = |line: &str, binding| {
        let rest = after(line, "> ");
        let (name, ty) = rest.split_once(": array<").expect("an array");
        let ty = ty.trim_end_matches(';').strip_suffix('>').expect("an array");
        let element = ty.rsplit_once(", ").map_or(ty, |(element, _)| element);
        Declared { name: name.to_owned(), binding, words: words_of(element) }
    };
    let lines = || source.lines().filter(|line| line.contains(": array<"));
    let storage =
        lines().filter(|line| line.starts_with("@group(0)") && line.contains("var<storage")).map(|line| {
            let binding = after(line, "@binding(").split_once(')').expect("a number").0.parse();
            array(line, binding.expect("a number"))
        });
    let workgroup =
        lines().filter(|line| line.starts_with("var<workgroup>")).map(|line| array(line, WORKGROUP));
    storage.chain(workgroup).collect()
}

/// The same kernel, counting into binding 0 of group 1.
fn counting(source: Source<'_>) -> String {
    let declared = declared(source.text);
    let mut text = String::new();
    for line in source.text.lines() {
        if line.contains("workgroupUniformLoad") {
            // It has a barrier before and one after.
            text.push_str("    atomicAdd(&counters[0], 2u);\n");
        }
        if line.trim_start().starts_with("//") || line.starts_with('@') || line.starts_with("var<") {
            text.push_str(line);
        } else {
            text.push_str(&indices_noted(line, &declared));
        }
        text.push('\n');
    }
    let text = text.replace("workgroupBarrier();", "count_barrier();");
    format!(
        "{text}
@group(1) @binding(0) var<storage, read_write> counters: array<atomic<u32>>;

fn count_barrier() {{
    atomicAdd(&counters[0], 1u);
    workgroupBarrier();
}}

fn touched(binding: u32, index: u32, stride: u32, first: u32, words: u32) -> u32 {{
    atomicAdd(&counters[1u + binding], words);
    if binding == {WORKGROUP}u {{
        return index;
    }}
    for (var i = 0u; i < words; i++) {{
        let word = index * stride + first + i;
        if word < {BUFFER_WORDS}u {{
            atomicOr(&counters[{MAPS_AT}u + binding * {MAP_WORDS}u + word / 32u], 1u << (word % 32u));
        }}
    }}
    return index;
}}
"
    )
}

/// The line with every index into one of the arrays passed through `touched`.
fn indices_noted(line: &str, declared: &[Declared]) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some(open) = rest.find('[') {
        let name: String = {
            let reversed = rest[..open].chars().rev();
            let name: String = reversed.take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            name.chars().rev().collect()
        };
        let mut depth = 0;
        let close = rest[open..]
            .char_indices()
            .find(|&(_, c)| {
                depth += i32::from(c == '[') - i32::from(c == ']');
                depth == 0
            })
            .map(|(at, _)| open + at)
            .expect("brackets in one line");
        let index = indices_noted(&rest[open + 1..close], declared);
        out.push_str(&rest[..=open]);
        match declared.iter().find(|buffer| buffer.name == name) {
            None => out.push_str(&index),
            Some(Declared { binding, words, .. }) => {
                let field: String = match rest[close + 1..].strip_prefix('.') {
                    Some(after) if *words > 1 => after.chars().take_while(|c| c.is_alphanumeric()).collect(),
                    _ => String::new(),
                };
                let (first, count) = if field.is_empty() { (0, *words) } else { (word_of_field(&field), 1) };
                let _ = write!(out, "touched({binding}u, {index}, {words}u, {first}u, {count}u)");
            }
        }
        out.push(']');
        rest = &rest[close + 1..];
    }
    out + rest
}

/// Bindings of whole buffers.
fn whole<'a>(buffers: &[(u32, &'a Buffer)]) -> Vec<(u32, BufferBinding<'a>)> {
    buffers.iter().map(|&(number, buffer)| (number, buffer.as_entire_buffer_binding())).collect()
}

/// Runs kernels and counts.
struct Counting {
    gpu: Arc<Gpu>,
}

impl Counting {
    /// Runs the kernel over buffers with these bindings; returns its cost, and what is then in the buffers that are asked for.
    fn run<const N: usize>(
        &self,
        source: Source<'static>,
        buffers: &[(u32, &Buffer)],
        groups: usize,
        wanted: [&Buffer; N],
    ) -> (Cost, [Vec<u32>; N]) {
        let text = counting(source);
        // The plain kernel is the one whose results count.
        let plain = self.gpu.pipeline(source).expect("the kernel");
        let copies: Vec<Buffer> = buffers.iter().map(|(_, buffer)| self.copy(buffer)).collect();
        let counted = self.gpu.pipeline(Source { label: source.label, text: &text }).expect("it counts");
        let counters = storage(&self.gpu, &vec![0; COUNTER_WORDS]);
        let copied: Vec<_> = buffers.iter().zip(&copies).map(|(&(number, _), copy)| (number, copy)).collect();
        let counted_group = self.gpu.bind_parts(&counted, &whole(&copied));
        let counters_group = self.gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &counted.get_bind_group_layout(1),
            entries: &[wgpu::BindGroupEntry { binding: 0, resource: counters.as_entire_binding() }],
        });
        let plain_group = self.gpu.bind_parts(&plain, &whole(buffers));
        let record = |commands: &mut CommandEncoder| {
            let mut pass = commands.begin_compute_pass(&ComputePassDescriptor::default());
            pass.set_pipeline(&counted);
            pass.set_bind_group(0, &counted_group, &[]);
            pass.set_bind_group(1, &counters_group, &[]);
            pass.dispatch_workgroups(groups as u32, 1, 1);
            pass.set_pipeline(&plain);
            pass.set_bind_group(0, &plain_group, &[]);
            pass.dispatch_workgroups(groups as u32, 1, 1);
        };
        let [counters] = run(&self.gpu, record, [&counters]);
        let results = run(&self.gpu, |_| (), wanted);
        let threads = groups * if source.label == kernels::OFFSETS.label { 256 } else { 32 };
        let touched: u32 = counters[MAPS_AT..].iter().map(|word| word.count_ones()).sum();
        let asked_for: u32 = counters[1..=BINDINGS].iter().sum();
        let cost = Cost {
            touched: touched as usize * 4 / PAGES,
            asked_for: asked_for as usize * 4 / PAGES,
            workgroup: counters[1 + WORKGROUP] as usize / PAGES,
            barriers: counters[0] as usize * 10 / threads,
        };
        (cost, results)
    }

    /// Another buffer with the same content.
    fn copy(&self, buffer: &Buffer) -> Buffer {
        if buffer.usage().contains(wgpu::BufferUsages::UNIFORM) {
            return buffer.clone();
        }
        let [words] = run(&self.gpu, |_| (), [buffer]);
        storage(&self.gpu, &words)
    }
}

/// A batch once through the encoder and the decoder; the cost of each kernel.
fn costs(counting: &Counting, pages: &[Page], bases: Option<&[Page]>) -> Vec<(&'static str, Cost)> {
    let gpu = &counting.gpu;
    let zeros = |words: usize| storage(gpu, &vec![0; words]);
    let allowed = u32::from(EncodingSet::ALL.bits());
    let params = uniform(gpu, [PAGES as u32, allowed, 0, 0]);
    let plain = storage(gpu, &page_words(pages));
    let base_pages = zeros(BUFFER_WORDS);
    let (results, scratch) = (zeros(4 * PAGES), zeros(BUFFER_WORDS));
    let has_base = storage(gpu, &[if bases.is_some() { u32::MAX } else { 0 }; PAGES / 32]);
    let (payload, table) = (zeros(BUFFER_WORDS), zeros(PAGES + 1));
    let mut costs = Vec::new();

    let chunk = storage(gpu, &page_words(bases.unwrap_or(pages)));
    let flags = if bases.is_some() { LOAD | STORE } else { STORE };
    let moves: Vec<u32> = (0..PAGES as u32).flat_map(|page| [page | flags, page]).collect();
    let moves = storage(gpu, &moves);
    let all = uniform(gpu, [0, PAGES as u32, LOAD | STORE, 0]);
    let buffers = [(0, &all), (1, &plain), (2, &base_pages), (3, &moves), (4, &chunk)];
    costs.push(("exchange", counting.run(kernels::EXCHANGE, &buffers, PAGES, []).0));

    let mut encode = |source: Source<'static>, bindings: &[u32], groups: usize| {
        let numbered = |&binding: &u32| {
            let buffers = [&params, &plain, &base_pages, &results, &scratch, &has_base, &payload, &table];
            (binding, buffers[binding as usize])
        };
        let buffers: Vec<_> = bindings.iter().map(numbered).collect();
        costs.push((source.label, counting.run(source, &buffers, groups, []).0));
    };
    encode(kernels::CLASSIFY, &[0, 1, 2, 3, 5], PAGES);
    encode(kernels::ENCODE_LZ4, &[0, 1, 2, 3, 4], PAGES);
    encode(kernels::ENCODE_SPARSE, &[0, 1, 2, 3, 4], PAGES);
    encode(kernels::OFFSETS, &[0, 3, 6, 7], 1);
    encode(kernels::PACK, &[0, 1, 3, 4, 6], PAGES);

    let [table, payload_words] = run(gpu, |_| (), [&table, &payload]);
    let encoded = EncodedBatch {
        encodings: table[..PAGES]
            .iter()
            .map(|word| Encoding::from_tag((word >> 16) as u8).expect("a tag"))
            .collect(),
        lens: table[..PAGES].iter().map(|word| *word as u16).collect(),
        ..EncodedBatch::default()
    };
    let mut plan = Plan::default();
    plan.make(&encoded, Some(&|_| true));
    let entries = storage(gpu, bytemuck::cast_slice(&plan.entries));
    let payload = storage(gpu, &payload_words[..(table[PAGES] as usize).div_ceil(4).max(1)]);
    let (decoded, status) = (zeros(BUFFER_WORDS), zeros(PAGES));
    let buffers = [(0, &params), (1, &entries), (2, &payload), (3, &base_pages), (4, &decoded), (5, &status)];
    let (cost, []) = counting.run(kernels::DECODE_PLAIN, &buffers, PAGES, []);
    costs.push((kernels::DECODE_PLAIN.label, cost));
    let (cost, [decoded]) = counting.run(kernels::DECODE_LZ4, &buffers, PAGES, [&decoded]);
    costs.push((kernels::DECODE_LZ4.label, cost));
    assert!(decoded == page_words(pages), "the pages come back as they were");
    costs
}

fn table(counting: &Counting) -> String {
    let first = mixed_image(PAGES, 1);
    let mut rng = SplitMix64::new(2);
    let mut again = first.clone();
    again.iter_mut().for_each(|page| mutate(page, Mutation::Share(0.01), &mut rng));
    let first_costs = costs(counting, &first, None);
    let again_costs = costs(counting, &again, Some(&first));
    let mut text = String::new();
    for (title, costs) in [("first sent", first_costs), ("sent again", again_costs)] {
        let _ = write!(
            text,
            "| {title} | device memory touched (B) | asked for (B) | workgroup memory (words) | barriers |\n\
             |---|---:|---:|---:|---:|\n"
        );
        for (name, Cost { touched, asked_for, workgroup, barriers }) in costs {
            let (whole, tenth) = (barriers / 10, barriers % 10);
            let _ = writeln!(text, "| `{name}` | {touched} | {asked_for} | {workgroup} | {whole}.{tenth} |");
        }
        text.push('\n');
    }
    text
}

#[test]
fn the_documented_costs_are_those_of_the_kernels() {
    let config = GpuConfig { stall_timeout: std::time::Duration::from_secs(120), ..GpuConfig::default() };
    let counting =
        Counting { gpu: Gpu::open(&software_adapter(), config).expect("the software device opens") };
    let table = table(&counting);
    let documented = include_str!("../../../docs/gpu-performance.md");
    assert!(documented.contains(&table), "docs/gpu-performance.md must have this table:\n{table}");
    assert_no_complaints();
}
