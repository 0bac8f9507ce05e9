//! NCCL's own descriptions of a machine: the topology that `NCCL_TOPO_DUMP_FILE` writes and
//! `NCCL_TOPO_FILE` reads, and the graphs of `NCCL_GRAPH_DUMP_FILE`.

use std::str::FromStr;

use roxmltree::Document;
use units::{BytesPerSecond, Seconds};

use super::graph::GB;
use super::{Cpu, Generation, Graph, Graphs, Interconnect, Node};
use crate::Error;

/// A PCI device's class as an NVLink's other end, where that is a switch.
const NVSWITCH: &str = "0x068000";
/// What NCCL takes a port's speed to be that does not tell (Mb/s).
const UNKNOWN_PORT: f64 = 10_000.0;
/// NCCL's number for trees of which one rank of a node talks to parent and children.
const PLAIN_TREE: u32 = 3;
/// NCCL's words for paths, from best to worst (`src/include/graph.h`).
const PATHS: [&str; 12] =
    ["LOC", "NVL", "NVB", "C2C", "PIX", "PXB", "P2C", "PXN", "PHB", "SYS", "NET", "DIS"];
/// The worst path to a port that LL128 is used over: PXB before Hopper, PXN since.
const LL128_PATHS: [&str; 2] = ["PXB", "PXN"];

type Element<'a> = roxmltree::Node<'a, 'a>;

/// A document, with the name of its file for what is wrong with it.
struct Reader<'a> {
    file: &'a str,
    document: &'a Document<'a>,
}

impl Node {
    /// The node of a topology file, all its GPUs as ranks. Where they differ, the least counts, as
    /// it does for NCCL.
    ///
    /// # Errors
    /// [`Error::Import`] with file, line and element when it is no XML, no such topology, lacks a
    /// GPU, or has a number that cannot be.
    pub fn from_xml(file: &str, text: &str) -> Result<Self, Error> {
        let document = parse(file, text)?;
        let reader = Reader { file, document: &document };
        let system = reader.root("system")?;
        let gpus: Vec<_> = descendants(system, "gpu").collect();
        let mut sm = u32::MAX;
        let mut inside = f64::INFINITY;
        let mut slot = f64::INFINITY;
        for gpu in &gpus {
            let own: u32 = reader.number(*gpu, "sm")?;
            sm = sm.min(own);
            inside = inside.min(reader.nvlinks(*gpu, own)?);
            slot = slot.min(reader.slots(*gpu)?);
        }
        if gpus.is_empty() {
            return Err(reader.error(system, "has no <gpu>".into()));
        }
        let ports: Vec<_> = descendants(system, "net").collect();
        let (mut speed, mut latency) = (0.0, 0.0_f64);
        for port in &ports {
            speed += reader.port(*port)?.min(reader.slots(*port)?);
            latency = latency.max(reader.number_or(*port, "latency", 0.0)?);
        }
        let switched = descendants(system, "nvlink")
            .any(|link| link.attribute("tclass").is_some_and(|class| class.starts_with(NVSWITCH)));
        let interconnect = match (inside > 0.0, switched) {
            (true, true) => Interconnect::Nvswitch,
            (true, false) => Interconnect::Nvlink,
            (false, _) => Interconnect::Pcie,
        };
        Ok(Self {
            generation: Generation::of_capability(sm),
            cpu: cpu(system),
            ranks: gpus.len() as u32,
            interconnect,
            inside: BytesPerSecond(GB * if inside > 0.0 { inside } else { slot }),
            outside: BytesPerSecond(GB * (speed / gpus.len() as f64).min(slot)),
            near_port: gpus.iter().all(|gpu| ports.iter().any(|port| same_switch(*gpu, *port))),
            port_latency: Seconds(latency * 1e-6),
        })
    }
}

impl Graphs {
    /// The graphs of a graph file, as found for GPUs of this generation.
    ///
    /// # Errors
    /// [`Error::Import`] with file, line and element when it is no XML, has not the graph of a ring
    /// and of a tree, or a number that cannot be.
    pub fn from_xml(file: &str, text: &str, generation: Generation) -> Result<Self, Error> {
        let document = parse(file, text)?;
        let reader = Reader { file, document: &document };
        let root = reader.root("graphs")?;
        let mut found: [Option<Graph>; 5] = [None; 5];
        for graph in descendants(root, "graph") {
            let id: usize = reader.number(graph, "id")?;
            let place = found.get_mut(id);
            let place =
                place.ok_or_else(|| reader.error(graph, format!("has an unknown id {id}")))?;
            *place = Some(reader.graph(graph, generation)?);
        }
        let [ring, tree, collnet_chain, nvls, collnet_direct] = found;
        let needed = |graph: Option<Graph>, id: u32, what: &str| {
            graph.ok_or_else(|| reader.error(root, format!("has no graph of id {id}, the {what}")))
        };
        let (ring, tree) = (needed(ring, 0, "ring")?, needed(tree, 1, "tree")?);
        let none = Graph { channels: 0, ..tree };
        let mut graphs = Self {
            ring,
            tree,
            nvls: nvls.unwrap_or(none),
            collnet_direct: collnet_direct.unwrap_or(none),
            collnet_chain: collnet_chain.unwrap_or(none),
        };
        if graphs.nvls.channels > 0 {
            graphs.all_mut().for_each(|graph| graph.interconnect = Interconnect::Nvswitch);
        }
        Ok(graphs)
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Graph> {
        let Self { ring, tree, nvls, collnet_direct, collnet_chain } = self;
        [ring, tree, nvls, collnet_direct, collnet_chain].into_iter()
    }
}

impl Generation {
    /// The generation of a GPU with this compute capability, times ten.
    #[must_use]
    pub fn of_capability(sm: u32) -> Self {
        match sm {
            ..80 => Self::Volta,
            80..90 => Self::Ampere,
            90..100 => Self::Hopper,
            100.. => Self::Blackwell,
        }
    }
}

/// What NCCL takes one NVLink to carry (GB/s; `src/graph/topo.h`).
fn nvlink(sm: u32) -> f64 {
    match sm {
        100.. => 40.1,
        90.. => 20.6,
        86 => 12.0,
        60..70 => 18.0,
        _ => 20.0,
    }
}

/// What a lane of PCI Express carries (GB/s); the third generation where nothing is said.
fn lane(speed: &str) -> f64 {
    let transfers = speed.split_whitespace().next().and_then(|number| number.parse().ok());
    match transfers {
        Some(2.5) => 0.1875,
        Some(5.0) => 0.375,
        Some(16.0) => 1.5,
        Some(32.0) => 3.0,
        Some(64.0) => 6.0,
        _ => 0.75_f64,
    }
}

fn cpu(system: Element) -> Cpu {
    let amd = |cpu: Element| cpu.attribute("vendor") == Some("AuthenticAMD");
    if descendants(system, "cpu").any(amd) { Cpu::Amd } else { Cpu::Intel }
}

/// Whether a path between the two stays below the host bridge.
fn same_switch(a: Element, b: Element) -> bool {
    let switches = |of: Element| {
        let above = of.ancestors().filter(|node| node.has_tag_name("pci")).map(|node| node.id());
        above.collect::<Vec<_>>()
    };
    let other = switches(b);
    switches(a).iter().any(|switch| other.contains(switch))
}

fn descendants<'a>(of: Element<'a>, name: &'a str) -> impl Iterator<Item = Element<'a>> {
    of.descendants().filter(move |node| node.has_tag_name(name))
}

fn parse<'a>(file: &str, text: &'a str) -> Result<Document<'a>, Error> {
    Document::parse(text).map_err(|error| Error::Import {
        file: file.to_owned(),
        line: error.pos().row,
        element: "document".to_owned(),
        reason: format!("is no XML: {error}"),
    })
}

impl<'a> Reader<'a> {
    fn root(&self, name: &str) -> Result<Element<'a>, Error> {
        let root = self.document.root_element();
        let found = root.has_tag_name(name);
        found.then_some(root).ok_or_else(|| self.error(root, format!("should be <{name}>")))
    }

    fn error(&self, at: Element, reason: String) -> Error {
        Error::Import {
            file: self.file.to_owned(),
            line: self.document.text_pos_at(at.range().start).row,
            element: at.tag_name().name().to_owned(),
            reason,
        }
    }

    fn number<T: FromStr>(&self, of: Element, key: &str) -> Result<T, Error> {
        let text = of.attribute(key);
        let text = text.ok_or_else(|| self.error(of, format!("lacks the attribute `{key}`")))?;
        let number = text.trim().parse();
        number.map_err(|_| self.error(of, format!("has {key}=\"{text}\", which is no such number")))
    }

    /// A number that is not negative, or `otherwise` where there is none.
    fn number_or(&self, of: Element, key: &str, otherwise: f64) -> Result<f64, Error> {
        if of.attribute(key).is_none_or(str::is_empty) {
            return Ok(otherwise);
        }
        let number: f64 = self.number(of, key)?;
        let good = (0.0..1e9).contains(&number);
        good.then_some(number)
            .ok_or_else(|| self.error(of, format!("has {key}=\"{number}\", which cannot be")))
    }

    /// What a GPU's NVLinks carry together (GB/s).
    fn nvlinks(&self, gpu: Element, sm: u32) -> Result<f64, Error> {
        let mut count = 0.0;
        for link in descendants(gpu, "nvlink") {
            count += self.number_or(link, "count", 1.0)?;
        }
        Ok(count * nvlink(sm))
    }

    /// What the narrowest PCI device above carries (GB/s); no limit where nothing is said.
    fn slots(&self, of: Element) -> Result<f64, Error> {
        let mut narrowest = f64::INFINITY;
        for device in of.ancestors().filter(|node| node.has_tag_name("pci")) {
            let Some(speed) = device.attribute("link_speed") else { continue };
            let width = self.number_or(device, "link_width", 16.0)?;
            let width = if width == 0.0 { 16.0 } else { width };
            narrowest = narrowest.min(width * lane(speed));
        }
        Ok(narrowest)
    }

    /// What a network port carries (GB/s). Some tell a speed of -1.
    fn port(&self, port: Element) -> Result<f64, Error> {
        let speed = match port.attribute("speed") {
            Some(_) => self.number::<f64>(port, "speed")?,
            None => 0.0,
        };
        if !speed.is_finite() || speed > 1e9 {
            return Err(self.error(port, format!("has speed=\"{speed}\", which cannot be")));
        }
        Ok(if speed > 0.0 { speed } else { UNKNOWN_PORT } / 8000.0)
    }

    fn graph(&self, graph: Element, generation: Generation) -> Result<Graph, Error> {
        let channels: u32 = self.number(graph, "nchannels")?;
        if channels > 64 {
            return Err(self.error(graph, format!("has {channels} channels; NCCL has 64 at most")));
        }
        let [inside, outside] = ["speedintra", "speedinter"]
            .map(|key| graph.attribute(key).map_or(Ok(0.0), |_| self.number_or(graph, key, 0.0)));
        let (inside, outside) = (inside?, outside?);
        if channels > 0 && inside <= 0.0 {
            return Err(self.error(graph, "has channels without `speedintra`".to_owned()));
        }
        let path = |key: &str| {
            let word = graph.attribute(key).unwrap_or("SYS");
            let known = PATHS.iter().position(|path| *path == word);
            known
                .ok_or_else(|| self.error(graph, format!("has {key}=\"{word}\", which is no path")))
        };
        let nvlink = path("typeintra")? <= 2;
        let farthest = LL128_PATHS[usize::from(generation >= Generation::Hopper)];
        let near = PATHS.iter().position(|path| *path == farthest);
        Ok(Graph {
            channels,
            inside: BytesPerSecond(inside * GB),
            outside: BytesPerSecond(outside * GB),
            interconnect: if nvlink { Interconnect::Nvlink } else { Interconnect::Pcie },
            near_port: Some(path("typeinter")?) <= near,
            same_channels: graph.attribute("samechannels") != Some("0"),
            plain_tree: self.number::<u32>(graph, "pattern")? == PLAIN_TREE,
            port_latency: Seconds(self.number_or(graph, "latencyinter", 0.0)? * 1e-6),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Algorithm, Communicator, Function, Protocol};
    use super::*;

    /// Two of the eight GPUs of a node with NVSwitch, as NCCL writes it.
    const TOPOLOGY: &str = r#"<system version="1">
  <cpu host_hash="0x1" numaid="0" affinity="ff" arch="x86_64" vendor="GenuineIntel" familyid="6" modelid="143">
    <pci busid="0000:18:00.0" class="0x060400" link_speed="32.0 GT/s PCIe" link_width="16">
      <pci busid="0000:1b:00.0" class="0x030200" link_speed="32.0 GT/s PCIe" link_width="16">
        <gpu dev="0" sm="90" rank="0" gdr="1">
          <nvlink target="0000:04:00.0" count="8" tclass="0x068000"/>
          <nvlink target="0000:05:00.0" count="10" tclass="0x068000"/>
        </gpu>
      </pci>
      <pci busid="0000:1c:00.0" class="0x020700" link_speed="32.0 GT/s PCIe" link_width="16">
        <nic>
          <net name="mlx5_0" dev="0" speed="400000" port="1" latency="0.500000" maxconn="131072" gdr="1"/>
        </nic>
      </pci>
    </pci>
    <pci busid="0000:2a:00.0" class="0x060400" link_speed="32.0 GT/s PCIe" link_width="16">
      <pci busid="0000:2b:00.0" class="0x030200" link_speed="32.0 GT/s PCIe" link_width="16">
        <gpu dev="1" sm="90" rank="1" gdr="1">
          <nvlink target="0000:04:00.0" count="18" tclass="0x068000"/>
        </gpu>
      </pci>
      <pci busid="0000:2c:00.0" class="0x020700" link_speed="32.0 GT/s PCIe" link_width="16">
        <nic>
          <net name="mlx5_1" dev="1" speed="400000" port="1" latency="0.000000" gdr="1"/>
        </nic>
      </pci>
    </pci>
  </cpu>
</system>"#;

    /// The graphs of the log that the tuner's test has: two nodes of one GPU over sockets.
    const GRAPHS: &str = r#"<graphs version="1">
  <graph id="0" pattern="4" crossnic="0" nchannels="2" speedintra="1.2" speedinter="1.2" latencyinter="0" typeintra="LOC" typeinter="SYS" samechannels="1">
    <channel><net dev="0"/><gpu dev="0" rank="0"/><net dev="0"/></channel>
  </graph>
  <graph id="1" pattern="3" crossnic="0" nchannels="2" speedintra="2.4" speedinter="1.2" latencyinter="0" typeintra="LOC" typeinter="SYS" samechannels="1"/>
  <graph id="3" pattern="5" crossnic="0" nchannels="0" speedintra="0" speedinter="0" latencyinter="0" typeintra="LOC" typeinter="PIX" samechannels="0"/>
</graphs>"#;

    #[test]
    fn a_topology_becomes_a_node() {
        let node = Node::from_xml("topo.xml", TOPOLOGY).unwrap();
        let expected = Node {
            generation: Generation::Hopper,
            cpu: Cpu::Intel,
            ranks: 2,
            interconnect: Interconnect::Nvswitch,
            inside: BytesPerSecond(18.0 * 20.6 * GB),
            outside: BytesPerSecond(48.0 * GB),
            near_port: true,
            port_latency: Seconds(0.5e-6),
        };
        assert_eq!(node, expected);
        assert_eq!(node.search(true).ring.channels, 4);
    }

    #[test]
    fn dumped_graphs_give_the_logged_table() {
        let graphs = Graphs::from_xml("graphs.xml", GRAPHS, Generation::Blackwell).unwrap();
        let communicator = Communicator {
            generation: Generation::Blackwell,
            cpu: Cpu::Intel,
            nodes: 2,
            ranks_per_node: 1,
            collnet: false,
            graphs,
        };
        let table = communicator.to_string();
        assert!(table.contains("LL 16.8/0.5"), "{table}");
        let bytes = units::Bytes(1 << 15);
        let way = communicator.estimate(Function::Broadcast, Algorithm::Ring, Protocol::Ll, bytes);
        assert_eq!(format!("{:.2}", way.unwrap().time.0 * 1e6), "36.61");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let message = |text: &str| Node::from_xml("t.xml", text).unwrap_err().to_string();
        let at = message(&TOPOLOGY.replace("sm=\"90\" rank=\"1\"", "sm=\"ninety\" rank=\"1\""));
        assert_eq!(at, "t.xml:18: <gpu> has sm=\"ninety\", which is no such number");
        assert_eq!(message("<system/>"), "t.xml:1: <system> has no <gpu>");
        assert_eq!(message("<a/>"), "t.xml:1: <a> should be <system>");
        let broken = message("<system>\n<gpu dev=></system>");
        assert!(broken.starts_with("t.xml:2: <document> is no XML: "), "{broken}");
        let slow = GRAPHS.replace("speedintra=\"1.2\"", "speedintra=\"-1\"");
        let error = Graphs::from_xml("g.xml", &slow, Generation::Hopper).unwrap_err();
        assert_eq!(error.to_string(), "g.xml:2: <graph> has speedintra=\"-1\", which cannot be");
        let one = "<graphs><graph id=\"0\" nchannels=\"0\" pattern=\"4\"/></graphs>";
        let error = Graphs::from_xml("g.xml", one, Generation::Hopper).unwrap_err();
        assert_eq!(error.to_string(), "g.xml:1: <graphs> has no graph of id 1, the tree");
    }

    /// Cuts, repeats and changes a document here and there.
    fn mangled(text: &'static str) -> impl Strategy<Value = String> {
        let places = prop::collection::vec((0..text.len(), any::<u8>(), 0_u8..4), 0..6);
        places.prop_map(move |places| {
            let mut bytes = text.as_bytes().to_vec();
            for (place, byte, change) in places {
                let place = place % bytes.len().max(1);
                match change {
                    0 => bytes.truncate(place),
                    1 => bytes.insert(place, byte),
                    2 if place < bytes.len() => drop(bytes.remove(place)),
                    _ if place < bytes.len() => bytes[place] = byte,
                    _ => {}
                }
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }

    proptest! {
        /// Whatever is in a file, it is read or refused, and what is read can be searched.
        #[test]
        fn a_mangled_file_is_read_or_refused(
            topology in mangled(TOPOLOGY),
            graphs in mangled(GRAPHS),
            noise in ".{0,200}",
        ) {
            for text in [&topology, &noise] {
                if let Ok(node) = Node::from_xml("t.xml", text) {
                    let communicator = Communicator::of_nodes(&node, 4, false);
                    let choice = communicator.choose(Function::AllReduce, units::Bytes(1 << 20));
                    prop_assert!(choice.time.0 > 0.0);
                }
            }
            for text in [&graphs, &noise] {
                let read = Graphs::from_xml("g.xml", text, Generation::Hopper);
                let named = |error: &Error| error.to_string().starts_with("g.xml:");
                prop_assert!(read.as_ref().err().is_none_or(named));
            }
        }
    }
}
