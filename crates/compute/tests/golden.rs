//! Held to what Hugging Face transformers and `torch.optim.AdamW` compute (`golden/`).
//! Logits within 1e-4 absolute; gradients and parameters within 1e-4 relative, by norm.

#![expect(clippy::unwrap_used, reason = "a test may panic on its own files")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use checkpoint::hugging_face::Weights;
use compute::{Cpu, Microbatch, Operators, Optimizer, OuterOptimizer, Precision, Stage, StageSpec};
use model::{Config, Segment};
use plan::{Batch, Layout, lower};
use program::{Action, Axis, Buffer, Instruction, Piece, Program, Transfer, Value};
use safetensors::SafeTensors;
use units::Rank;

const SEQUENCES: usize = 3;
const LENGTH: usize = 24;

struct Golden {
    config: Config,
    weights: Weights,
    tensors: BTreeMap<String, Vec<f32>>,
    tokens: Vec<u32>,
}

impl Golden {
    fn open(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name);
        let json = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words = |view: &[u8]| -> Vec<[u8; 4]> { view.as_chunks::<4>().0.to_vec() };
        let tensors = file
            .iter()
            .map(|(name, view)| {
                let values = words(view.data()).into_iter().map(f32::from_le_bytes).collect();
                (name.to_owned(), values)
            })
            .collect();
        let tokens = words(file.tensor("tokens").unwrap().data());
        Self {
            config: model::hugging_face::from_json(&json).unwrap(),
            weights: Weights::open(&folder).unwrap(),
            tensors,
            tokens: tokens.into_iter().map(u32::from_le_bytes).collect(),
        }
    }

    fn microbatch(&self) -> Microbatch {
        let rows = || self.tokens.chunks_exact(LENGTH + 1);
        Microbatch {
            words: rows().flat_map(|row| row[..LENGTH].to_vec()).collect(),
            targets: rows().flat_map(|row| row[1..].to_vec()).collect(),
            ..Microbatch::default()
        }
    }

    fn stage<O: Operators>(&self, device: O, program: &Program) -> Stage<O> {
        let blocks: Vec<_> = self.config.blocks().collect();
        let spec = StageSpec::new(&self.config, program, Rank(0), blocks);
        let optimizer = Optimizer {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: None,
            outer: OuterOptimizer::default(),
        };
        Stage::new(device, self.config.clone(), spec, optimizer, |block, values| {
            self.weights.read_block(&self.config, block, values)
        })
        .unwrap()
    }

    /// Holds the parameters of every block to the golden tensors of `prefix`.
    fn check(&self, prefix: &str, mut values_of: impl FnMut(model::Block) -> Vec<f32>) {
        for block in self.config.blocks() {
            let values = values_of(block);
            for parameter in self.config.stored_parameters(block) {
                if prefix == "gradient" && parameter.role == model::Role::RouterBias {
                    continue; // what stands there is no gradient
                }
                let golden = &self.tensors[&format!("{prefix}.{}", parameter.name)];
                let error = relative_error(&values[parameter.range()], golden);
                assert!(error < 1e-4, "{prefix}.{}: {error:.2e}", parameter.name);
            }
        }
    }
}

fn relative_error(ours: &[f32], golden: &[f32]) -> f64 {
    assert_eq!(ours.len(), golden.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = &mut ours.iter().zip(golden).map(|(a, b)| f64::from(a - b));
    norm(difference) / norm(&mut golden.iter().map(|v| f64::from(*v)))
}

fn transfer(buffer: Buffer) -> Transfer {
    let action = Action::Collective(collective::Kind::AllReduce);
    Transfer {
        action,
        axis: Axis::Data,
        buffer,
        elements: 0,
        element_bytes: 4,
        piece: Piece::WHOLE,
    }
}

/// Looks at a buffer in passing.
fn peek<O: Operators>(stage: &mut Stage<O>, buffer: Buffer) -> Vec<f32> {
    let values = stage.take(&transfer(buffer));
    stage.put(&transfer(buffer), values.clone());
    values
}

fn holds(device: impl Operators, name: &str) {
    let golden = Golden::open(name);
    let batch = Batch { sequence: LENGTH as u64, global_batch: SEQUENCES as u64 };
    let layout = Layout::one_rank(SEQUENCES as u64);
    let program = lower(&golden.config, &layout, &batch).unwrap();
    let mut stage = golden.stage(device, &program);

    for step in 0..=10 {
        stage.begin(&program, vec![golden.microbatch()], 1e-2);
        for instruction in program.instructions(Rank(0)) {
            let first = step == 0;
            match instruction {
                Instruction::Compute { segment: Segment::Loss, pass, .. }
                    if first && *pass == model::Pass::Forward =>
                {
                    let value = Value::Logits(golden.config.layers);
                    let logits = peek(&mut stage, Buffer::Activation { value, microbatch: 0 });
                    for (ours, golden) in logits.iter().zip(&golden.tensors["logits"]) {
                        assert!((ours - golden).abs() < 1e-4, "{ours} for {golden}");
                    }
                }
                Instruction::SquareSum { block: model::Block::Embedding } if first => {
                    golden.check("gradient", |block| peek(&mut stage, Buffer::Gradients(block)));
                }
                _ => {}
            }
            if step < 10 || matches!(instruction, Instruction::Compute { .. }) {
                stage.run(instruction);
            }
        }
        let expected = f64::from(golden.tensors["losses"][step]);
        assert!((stage.loss() - expected).abs() < 1e-4, "step {step}: {}", stage.loss());
        match step {
            0 => golden.check("after1", |block| stage.master(block).1),
            9 => golden.check("after10", |block| stage.master(block).1),
            _ => {}
        }
    }
}

#[test]
fn a_llama_matches_transformers() {
    holds(Cpu::new(1, Precision::Fp32), "tiny-llama");
}

#[test]
fn a_llama_with_tied_embeddings_matches_transformers() {
    holds(Cpu::new(1, Precision::Fp32), "tiny-llama-tied");
}

#[test]
fn a_mixtral_matches_transformers() {
    holds(Cpu::new(1, Precision::Fp32), "tiny-mixtral");
}

#[test]
fn deepseeks_experts_match_transformers() {
    holds(Cpu::new(1, Precision::Fp32), "tiny-glm4-moe");
}

#[test]
fn latent_attention_matches_transformers() {
    holds(Cpu::new(1, Precision::Fp32), "tiny-deepseek-v3");
    holds(Cpu::new(1, Precision::Fp32), "tiny-deepseek-v2");
}

#[test]
fn windows_and_norms_of_heads_match_transformers() {
    holds(Cpu::new(1, Precision::Fp32), "tiny-mistral");
    holds(Cpu::new(1, Precision::Fp32), "tiny-qwen3");
    holds(Cpu::new(1, Precision::Fp32), "tiny-qwen3-moe");
}

#[cfg(feature = "burn")]
#[test]
fn mixtures_of_experts_on_burn_match_transformers() {
    holds(compute::Burn::flex(), "tiny-mixtral");
    holds(compute::Burn::flex(), "tiny-glm4-moe");
    holds(compute::Burn::flex(), "tiny-deepseek-v3");
    holds(compute::Burn::flex(), "tiny-qwen3");
}

#[cfg(feature = "burn")]
#[test]
fn a_llama_on_burn_matches_transformers() {
    holds(compute::Burn::flex(), "tiny-llama");
    holds(compute::Burn::flex(), "tiny-llama-tied");
}
