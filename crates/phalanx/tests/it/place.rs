//! A temporary folder with some text in it, in which the binary is run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use checkpoint::hugging_face::{Dtype, Writer};
use model::{Config, Rotary};
use serde_json::Value;
use tempfile::TempDir;

/// What launchers put into the environment: the binary must not see that of the tests' own.
const VARIABLES: [&str; 14] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "SLURM_PROCID",
    "SLURM_STEP_ID",
    "SLURM_JOB_ID",
    "PHALANX_SECRET",
    "PHALANX_SECRET_FILE",
];

/// A model of four layers and a job on it that takes seconds.
pub const JOB: &str = r#"
[model]
layers = 4
hidden = 32
heads = 4
kv_heads = 2
feed_forward = 64
vocabulary = 320

[data]
text = ["text.txt"]

[training]
sequence = 32
global_batch = 8
steps = 20
learning_rate = 1e-2
evaluation_sequences = 8

[run]
measure = false
"#;

/// The parts of a job file that most tests choose: ranks and layout.
pub fn over(ranks: u32, layout: &str) -> String {
    format!("{JOB}\n[cluster]\naccelerators = {ranks}\n\n[layout]\n{layout}\n")
}

/// The model of [`JOB`].
pub fn config() -> Config {
    Config {
        layers: 4,
        hidden: 32,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        feed_forward: 64,
        vocabulary: 320,
        tied_embeddings: false,
        norm_epsilon: 1e-5,
        rotary: Rotary { theta: 500_000.0, scaling: None },
        context: 64,
        ..Config::default()
    }
}

/// A folder that is gone after the test.
pub struct Place(TempDir);

impl Place {
    /// A folder with a few hundred kilobytes of text.
    pub fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        place.write("text.txt", prose(8000));
        place
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Puts a file into it.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    /// A file's contents.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// A file of JSON.
    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).unwrap()
    }

    /// The records of a run's metrics that tell of an event.
    pub fn metrics(&self, run: &str, event: &str) -> Vec<Value> {
        let text = self.read(&format!("{run}/metrics.jsonl"));
        let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        records.filter(|record| record["event"] == event).collect()
    }

    /// The loss of every step of a run, or of every evaluation.
    pub fn losses(&self, run: &str, event: &str) -> Vec<f64> {
        let records = self.metrics(run, event);
        records.iter().map(|record| record["loss"].as_f64().unwrap()).collect()
    }

    /// The binary, about to run in the folder with an environment that no launcher has touched.
    pub fn phalanx(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_phalanx"));
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        // Where ranks that are started by hand find their secret.
        command.env("XDG_CONFIG_HOME", self.path("config"));
        // Where it keeps what it has found out about the machine.
        command.env("XDG_CACHE_HOME", self.path("cache"));
        VARIABLES.iter().for_each(|variable| {
            command.env_remove(variable);
        });
        command
    }

    /// Runs a line as a shell does, with the binary as `phalanx`; what it prints. It must succeed.
    pub fn shell(&self, line: &str) -> String {
        let mut command = Command::new("sh");
        let binary = Path::new(env!("CARGO_BIN_EXE_phalanx")).parent().unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        command.args(["-c", line]).current_dir(self.0.path()).stdin(Stdio::null());
        command.env("PATH", format!("{}:{path}", binary.display())).env("COLUMNS", "100");
        VARIABLES.iter().for_each(|variable| {
            command.env_remove(variable);
        });
        let answer = Answer::new(command.output().unwrap(), self);
        assert_eq!(answer.code, Some(0), "`{line}`: {}{}", answer.stdout, answer.stderr);
        answer.stdout
    }

    /// Runs the binary to its end.
    pub fn run(&self, arguments: &[&str]) -> Answer {
        Answer::new(self.phalanx(arguments).output().unwrap(), self)
    }

    /// Runs a job that must succeed; what it prints.
    pub fn succeed(&self, arguments: &[&str]) -> String {
        let answer = self.run(arguments);
        assert_eq!((answer.code, answer.stderr.as_str()), (Some(0), ""), "{}", answer.stdout);
        answer.stdout
    }

    /// Writes a Hugging Face folder with the model of [`JOB`], all zeros.
    pub fn write_model(&self, name: &str) {
        let config = config();
        let zeros: Vec<(_, Vec<f32>)> = config
            .blocks()
            .map(|block| (block, vec![0.0; config.block_elements(block) as usize]))
            .collect();
        let blocks: Vec<_> = zeros.iter().map(|(block, values)| (*block, &values[..])).collect();
        let writer = Writer::new(&self.path(name), &config, Dtype::F32).unwrap();
        writer.write_shard(0, 1, &blocks).unwrap();
        writer.write_config().unwrap();
    }

    /// The files below a folder with their contents, by path.
    pub fn files(&self, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        collect(&self.path(name), &mut files);
        files
    }
}

fn collect(folder: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
}

/// What the binary said; paths of the test's folder are written `DIR`.
#[derive(Debug)]
pub struct Answer {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    pub fn new(output: Output, place: &Place) -> Self {
        let folder = place.0.path().to_str().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap().replace(folder, "DIR");
        let (stdout, stderr) = (text(output.stdout), text(output.stderr));
        Self { code: output.status.code(), stdout, stderr }
    }
}

/// Sentences with a structure that a small model finds within a few steps.
fn prose(sentences: usize) -> String {
    let who = ["the first rank", "a later stage", "one shard of four", "the whole group"];
    let does = ["sends", "keeps", "gathers", "reduces", "forgets"];
    let what = ["its chunk", "the loss", "every gradient", "a block", "its parameters", "nothing"];
    let sentence = |index: usize| {
        let mixed = index * index / 7 + index / 3;
        format!("{} {} {}.\n", who[mixed % 4], does[mixed / 4 % 5], what[(mixed / 20 + index) % 6])
    };
    (0..sentences).map(sentence).collect()
}
