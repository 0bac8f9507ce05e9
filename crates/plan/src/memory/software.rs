//! Programs that train, as far as they differ in what they hold for the same mathematics.

use units::Bytes;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The habits of a program that trains.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Software {
    /// Its name, and the version looked at.
    pub name: &'static str,
    /// Whether products add to the accumulated gradient themselves, and the tensor library is
    /// handed a placeholder of the matrix's shape, which is kept.
    pub gradient_placeholders: bool,
    /// Bytes of a gradient while microbatches are added up.
    pub gradient: u64,
    /// Bytes a parameter of gradients besides those.
    pub second_gradient: u64,
    /// Whether gate, up and activation are one kernel.
    pub fused_activation: bool,
    /// Whether queries and keys are rotated in place: else both are kept, before and after, since
    /// values are a part of the same tensor as those before.
    pub fused_rotary: bool,
    /// Whether inputs gathered under sequence parallelism are kept, and not gathered again.
    pub gathered_inputs: bool,
    /// Bytes a logit at the worst moment of a loss that is not fused.
    pub logit: u64,
    /// Whether eight-bit training keeps product inputs in eight bits.
    pub narrow_operands: bool,
    /// How many copies of a matrix in the format of products are kept between microbatches, where
    /// that format is narrower than bf16: one as it is and one transposed.
    pub narrow_copies: u64,
    /// Whether those copies are the parameters, and there are none in bf16.
    pub narrow_parameters: bool,
    /// The vocabulary is padded to a multiple of this, times the tensor degree.
    pub vocabulary_multiple: u64,
    /// Whether fully sharded parameters stay gathered, and gradients whole, over the microbatches
    /// of a pipeline.
    pub whole_when_pipelined: bool,
    /// Workspaces of libraries, and buckets of transfers.
    pub workspace: Bytes,
    /// What the streams of grouped products take besides.
    pub grouped_workspace: Bytes,
    /// Bytes reserved by the allocator over bytes in tensors.
    pub fragmentation: f64,
    /// What stands outside of the allocator.
    pub context: Bytes,
}

impl Software {
    /// Megatron-LM with Megatron Core 0.14 and Transformer Engine 2.11.
    ///
    /// `workspace` is the 32 MiB of cuBLAS on Hopper and later (cuBLAS documentation, 12.x,
    /// `cublasSetWorkspace`) and what was found beyond them on SimuMax's B200 rows (v1.2,
    /// 2026-05-01); `grouped_workspace` 32 MiB for each of the four streams of Transformer
    /// Engine's grouped product. `fragmentation` is the middle of peak reserved over peak allocated
    /// in those rows (1.015 to 1.095).
    pub const MEGATRON_CORE: Self = Self {
        name: "megatron-core 0.14",
        gradient_placeholders: true,
        gradient: 4,
        second_gradient: 0,
        fused_activation: true,
        fused_rotary: true,
        gathered_inputs: false,
        // The copy in fp32 that softmax is taken in, in place (megatron/core/tensor_parallel/
        // cross_entropy.py), besides the logits themselves.
        logit: 6,
        narrow_operands: true,
        narrow_copies: 2,
        narrow_parameters: false,
        vocabulary_multiple: 128,
        whole_when_pipelined: false,
        workspace: Bytes(48 * MIB),
        grouped_workspace: Bytes(4 * 32 * MIB),
        fragmentation: 1.03,
        // An assumption: no row says.
        context: Bytes(2 * GIB),
    };

    /// NVIDIA's recipes for it (`NeMo`, Megatron Bridge, `MLPerf`): gradients added up and reduced in
    /// bf16 (`grad_reduce_in_fp32=False`), eight-bit parameters (`fp8_param_gather`).
    pub const NEMO: Self =
        Self { name: "nemo 25.04", gradient: 2, narrow_parameters: true, ..Self::MEGATRON_CORE };

    /// Megatron-LM of 2022, which Korthikanti et al. describe: no fused products of its own.
    pub const MEGATRON_2022: Self = Self {
        name: "megatron-lm 2022",
        gradient_placeholders: false,
        workspace: Bytes::ZERO,
        grouped_workspace: Bytes::ZERO,
        ..Self::MEGATRON_CORE
    };

    /// Megatron-DeepSpeed as BLOOM was trained with. `second_gradient` are the bf16 gradients that
    /// its bf16 optimizer keeps besides the fp32 ones (deepspeed/runtime/bf16_optimizer.py).
    /// `fragmentation` and `context` were found on the rows of BigScience's log (2022-02), which
    /// are whole gigabytes as `nvidia-smi` shows them.
    pub const MEGATRON_DEEPSPEED: Self = Self {
        name: "megatron-deepspeed 2022",
        second_gradient: 2,
        logit: 10,
        fragmentation: 1.2,
        context: Bytes(6 * GIB),
        ..Self::MEGATRON_2022
    };

    /// nanotron of early 2025: gradients in bf16 and accumulated in fp32
    /// (nanotron/optim/gradient_accumulator.py); loss on an fp32 copy of the logits
    /// (nanotron/parallel/tensor_parallel/functional.py).
    pub const NANOTRON: Self = Self {
        name: "nanotron 2025",
        gradient_placeholders: false,
        second_gradient: 2,
        fused_activation: false,
        fused_rotary: false,
        gathered_inputs: true,
        logit: 10,
        vocabulary_multiple: 1,
        ..Self::MEGATRON_CORE
    };

    /// torchtitan of 2024: fully sharded with FSDP2, eight-bit casts that autograd sees through,
    /// and a loss in plain PyTorch: logits in bf16 and fp32, log-softmax, and the gradient.
    pub const TORCHTITAN: Self = Self {
        name: "torchtitan 2024",
        gradient_placeholders: false,
        fused_activation: false,
        fused_rotary: false,
        gathered_inputs: true,
        logit: 14,
        narrow_operands: false,
        narrow_copies: 0,
        vocabulary_multiple: 1,
        whole_when_pipelined: true,
        ..Self::MEGATRON_CORE
    };
}
