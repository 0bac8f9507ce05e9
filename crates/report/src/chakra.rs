//! Steps as Chakra execution traces, which `ASTRA-sim` and other simulators take as workloads.
//!
//! The messages are those of `schema/protobuf/et_def.proto` in github.com/mlcommons/chakra (read
//! November 2026), with only the fields that are written. A file is a [`Metadata`] and then a
//! [`Node`] for each computation and transfer, each with its length before it as a varint.

use std::collections::BTreeMap;

use collective::Kind;
use program::{Action, Axis, Instruction, Lane, Program, Ticket, Trace, Transfer};
use prost::Message;
use units::{Bytes, Rank, Seconds};

/// The release of the schema.
const VERSION: &str = "0.0.4";
/// Bytes of an element of what operators read and write, where a consumer has its own roofline.
const ELEMENT: Bytes = Bytes(2);

/// What begins a file.
#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(string, tag = "1")]
    version: String,
}

/// Something that a rank does.
#[derive(Clone, PartialEq, Message)]
struct Node {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(enumeration = "NodeType", tag = "3")]
    kind: i32,
    /// What must be over before.
    #[prost(uint64, repeated, tag = "5")]
    data_deps: Vec<u64>,
    #[prost(uint64, tag = "7")]
    duration_micros: u64,
    #[prost(message, repeated, tag = "10")]
    attributes: Vec<Attribute>,
}

/// A named property of a node.
#[derive(Clone, PartialEq, Message)]
struct Attribute {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(oneof = "Value", tags = "7, 9, 13, 27, 29")]
    value: Option<Value>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Value {
    #[prost(int32, tag = "7")]
    Int32(i32),
    #[prost(int64, tag = "9")]
    Int64(i64),
    #[prost(uint64, tag = "13")]
    Uint64(u64),
    #[prost(bool, tag = "27")]
    Bool(bool),
    #[prost(string, tag = "29")]
    Text(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum NodeType {
    Invalid = 0,
    Compute = 4,
    Send = 5,
    Receive = 6,
    Collective = 7,
}

/// The communicators of a program: groups of ranks, numbered from 1.
#[derive(Debug, Default)]
pub struct Communicators {
    numbers: BTreeMap<(Axis, Rank), usize>,
    groups: Vec<Vec<Rank>>,
}

impl Communicators {
    /// The members of each communicator that was met so far, as the JSON object that `ASTRA-sim`
    /// takes: numbers to lists of ranks.
    #[must_use]
    pub fn json(&self) -> String {
        let groups = (1..).zip(&self.groups);
        let groups: BTreeMap<usize, &Vec<Rank>> = groups.collect();
        serde_json::json!(groups).to_string()
    }

    fn number(&mut self, program: &Program, rank: Rank, axis: Axis) -> usize {
        let leader = program.mesh.leader(rank, axis);
        *self.numbers.entry((axis, leader)).or_insert_with(|| {
            self.groups.push(program.mesh.group(leader, axis));
            self.groups.len()
        })
    }
}

/// The step of `rank` as the bytes of a file. How long computations take is read from `trace`, of
/// this rank or of one that does the same, in whole microseconds.
///
/// A computation depends on the one before it and on the transfers that were waited for between
/// them; a transfer on the computations and waits before its post, and on the one before it on
/// the same communicator. As `ASTRA-sim` counts it, the size of a gather is what each rank
/// brings, that of every other collective the whole buffer.
#[must_use]
pub fn chakra(
    program: &Program,
    rank: Rank,
    trace: &Trace,
    communicators: &mut Communicators,
) -> Vec<u8> {
    let mut writer = Writer {
        program,
        rank,
        durations: durations(program, rank, trace),
        communicators,
        nodes: Vec::new(),
        after: Vec::new(),
        transfers: BTreeMap::new(),
        latest: BTreeMap::new(),
        messages: BTreeMap::new(),
    };
    for (index, instruction) in program.instructions(rank).iter().enumerate() {
        writer.write(index, instruction);
    }
    let mut bytes = Metadata { version: VERSION.to_owned() }.encode_length_delimited_to_vec();
    for node in writer.nodes {
        bytes.extend(node.encode_length_delimited_to_vec());
    }
    bytes
}

/// The computing time of each instruction, by its index.
fn durations(program: &Program, rank: Rank, trace: &Trace) -> BTreeMap<u32, Seconds> {
    let class = |rank| program.mesh.coordinate(rank, Axis::Pipeline);
    let alike = trace.spans.iter().map(|span| span.rank).find(|other| class(*other) == class(rank));
    let mine = trace.spans.iter().filter(|span| Some(span.rank) == alike);
    mine.filter(|span| span.lane == Lane::Compute)
        .map(|span| (span.instruction, span.end - span.start))
        .collect()
}

/// The stream on which transfers go one after another.
type Stream = (Axis, Option<(Rank, Rank)>);

struct Writer<'a> {
    program: &'a Program,
    rank: Rank,
    durations: BTreeMap<u32, Seconds>,
    communicators: &'a mut Communicators,
    nodes: Vec<Node>,
    /// What the next node comes after: the last computation, and transfers waited for since.
    after: Vec<u64>,
    /// The nodes of each posted transfer.
    transfers: BTreeMap<Ticket, Vec<u64>>,
    /// The last node of each stream.
    latest: BTreeMap<Stream, u64>,
    /// Messages so far from one rank to another.
    messages: BTreeMap<Stream, i32>,
}

impl Writer<'_> {
    fn write(&mut self, index: usize, instruction: &Instruction) {
        match instruction {
            Instruction::Post { ticket, transfer } => {
                let nodes = self.transfer(transfer);
                self.transfers.insert(*ticket, nodes);
            }
            Instruction::Wait { ticket } => {
                let waited = self.transfers.remove(ticket).unwrap_or_default();
                self.after.extend(waited);
            }
            Instruction::Compute { .. }
            | Instruction::Accumulate { .. }
            | Instruction::SquareSum { .. }
            | Instruction::Update { .. }
            | Instruction::OuterUpdate { .. } => self.compute(index, instruction),
            Instruction::Release { .. } | Instruction::Discard { .. } => {}
        }
    }

    fn compute(&mut self, index: usize, instruction: &Instruction) {
        let operators = self.program.operators(instruction);
        let flops: u64 = operators.iter().map(|operator| operator.flops().0).sum();
        let bytes: u64 = operators.iter().map(|operator| operator.bytes(ELEMENT).0).sum();
        let time = self.durations.get(&(index as u32)).copied().unwrap_or_default();
        let attributes = vec![
            attribute("is_cpu_op", Value::Bool(false)),
            attribute("num_ops", Value::Int64(flops as i64)),
            attribute("tensor_size", Value::Uint64(bytes)),
        ];
        let after = std::mem::take(&mut self.after);
        let node = self.push(NodeType::Compute, instruction.to_string(), after, time, attributes);
        self.after = vec![node];
    }

    fn transfer(&mut self, transfer: &Transfer) -> Vec<u64> {
        let (mesh, axis, rank) = (self.program.mesh, transfer.axis, self.rank);
        let peer = |coordinate| mesh.peer(rank, axis, coordinate);
        match transfer.action {
            Action::Collective(kind) => vec![self.collective(kind, transfer)],
            Action::Send { to } => vec![self.message(rank, peer(to), transfer)],
            Action::Receive { from } => vec![self.message(peer(from), rank, transfer)],
            Action::Shift => {
                let (place, degree) = (mesh.coordinate(rank, axis), mesh.degree(axis));
                let (next, before) =
                    (peer((place + 1) % degree), peer((place + degree - 1) % degree));
                vec![self.message(rank, next, transfer), self.message(before, rank, transfer)]
            }
        }
    }

    fn collective(&mut self, kind: Kind, transfer: &Transfer) -> u64 {
        let members = u64::from(self.program.mesh.degree(transfer.axis));
        // `CollectiveCommType` of the schema.
        let number = match kind {
            Kind::AllReduce => 0,
            Kind::Reduce => 1,
            Kind::AllGather => 2,
            Kind::Gather => 3,
            Kind::Scatter => 4,
            Kind::Broadcast => 5,
            Kind::AllToAll => 6,
            Kind::ReduceScatter => 7,
            Kind::Barrier => 9,
        };
        let parts = if matches!(kind, Kind::AllGather | Kind::Gather) { members } else { 1 };
        let size = transfer.bytes().0 / parts;
        let group = self.communicators.number(self.program, self.rank, transfer.axis);
        let attributes = vec![
            attribute("is_cpu_op", Value::Bool(false)),
            attribute("comm_type", Value::Int64(number)),
            attribute("comm_size", Value::Int64(size as i64)),
            attribute("pg_name", Value::Text(group.to_string())),
        ];
        self.post(NodeType::Collective, (transfer.axis, None), transfer, attributes)
    }

    fn message(&mut self, from: Rank, to: Rank, transfer: &Transfer) -> u64 {
        let stream = (transfer.axis, Some((from, to)));
        let tag = self.messages.entry(stream).or_default();
        *tag += 1;
        let attributes = vec![
            attribute("is_cpu_op", Value::Bool(false)),
            attribute("comm_src", Value::Int32(from.0 as i32)),
            attribute("comm_dst", Value::Int32(to.0 as i32)),
            attribute("comm_size", Value::Int64(transfer.bytes().0 as i64)),
            attribute("comm_tag", Value::Int32(*tag)),
        ];
        let kind = if from == self.rank { NodeType::Send } else { NodeType::Receive };
        self.post(kind, stream, transfer, attributes)
    }

    fn post(
        &mut self,
        kind: NodeType,
        stream: Stream,
        transfer: &Transfer,
        attributes: Vec<Attribute>,
    ) -> u64 {
        let mut after = self.after.clone();
        after.extend(self.latest.get(&stream));
        after.sort_unstable();
        after.dedup();
        let node = self.push(kind, transfer.to_string(), after, Seconds::ZERO, attributes);
        self.latest.insert(stream, node);
        node
    }

    fn push(
        &mut self,
        kind: NodeType,
        name: String,
        data_deps: Vec<u64>,
        time: Seconds,
        attributes: Vec<Attribute>,
    ) -> u64 {
        let id = self.nodes.len() as u64;
        let duration_micros = (time.0 * 1e6).round() as u64;
        self.nodes.push(Node {
            id,
            name,
            kind: kind as i32,
            data_deps,
            duration_micros,
            attributes,
        });
        id
    }
}

fn attribute(name: &str, value: Value) -> Attribute {
    Attribute { name: name.to_owned(), value: Some(value) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{program, trace};

    fn nodes(rank: u32) -> (Vec<Node>, Communicators) {
        let mut communicators = Communicators::default();
        let bytes = chakra(&program(), Rank(rank), &trace(), &mut communicators);
        let mut rest = bytes.as_slice();
        let metadata = Metadata::decode_length_delimited(&mut rest).unwrap();
        assert_eq!(metadata.version, VERSION);
        let mut nodes = Vec::new();
        while !rest.is_empty() {
            nodes.push(Node::decode_length_delimited(&mut rest).unwrap());
        }
        (nodes, communicators)
    }

    fn value(node: &Node, name: &str) -> Value {
        let found = node.attributes.iter().find(|attribute| attribute.name == name);
        found.and_then(|attribute| attribute.value.clone()).unwrap()
    }

    #[test]
    fn a_node_has_the_bytes_of_the_schema() {
        let attributes = vec![attribute("is_cpu_op", Value::Bool(false))];
        let node = Node {
            id: 3,
            name: "n".to_owned(),
            kind: NodeType::Collective as i32,
            data_deps: vec![1, 2],
            duration_micros: 300,
            attributes,
        };
        // Field number times 8 plus wire type, then the value; proto3 packs repeated numbers.
        let mut expected = vec![30, 0x08, 3, 0x12, 1, b'n', 0x18, 7, 0x2a, 2, 1, 2, 0x38, 0xac, 2];
        expected.extend([0x52, 14, 0x0a, 9]);
        expected.extend(b"is_cpu_op");
        expected.extend([0xd8, 0x01, 0]);
        assert_eq!(node.encode_length_delimited_to_vec(), expected);
    }

    #[test]
    fn what_is_not_waited_for_depends_only_on_what_came_before_its_post() {
        let (nodes, _) = nodes(0);
        let deps: Vec<_> = nodes.iter().map(|node| node.data_deps.clone()).collect();
        assert_eq!(deps, [vec![], vec![0], vec![0]]);
        assert_eq!(nodes[0].duration_micros, 2_000_000);
        let kinds: Vec<_> = nodes.iter().map(Node::kind).collect();
        assert_eq!(kinds, [NodeType::Compute, NodeType::Send, NodeType::Collective]);
    }

    #[test]
    fn what_computes_after_a_wait_depends_on_the_transfer() {
        let (nodes, _) = nodes(3);
        assert_eq!(nodes[0].kind(), NodeType::Receive);
        assert_eq!(nodes[1].data_deps, [0]);
        assert_eq!(value(&nodes[0], "comm_src"), Value::Int32(1));
        assert_eq!(value(&nodes[0], "comm_dst"), Value::Int32(3));
        assert_eq!(value(&nodes[0], "comm_size"), Value::Int64(1024));
    }

    #[test]
    fn collectives_name_their_communicator() {
        let (nodes, communicators) = nodes(1);
        assert_eq!(value(&nodes[2], "pg_name"), Value::Text("1".to_owned()));
        assert_eq!(value(&nodes[2], "comm_type"), Value::Int64(0));
        assert_eq!(communicators.json(), r#"{"1":[0,1]}"#);
    }
}
