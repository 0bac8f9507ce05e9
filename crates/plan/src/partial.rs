//! A layout as a job file gives it, and what is filled in.

use model::{AttentionKernel, Config};
use program::{Mesh, Placement};
use serde::{Deserialize, Serialize};

use crate::{
    Batch, ContextExchange, Layout, LayoutError, Recompute, Schedule, Shard, TensorOverlap, Timing,
};

/// A layout as a job file gives it: what is left out is chosen by [`PartialLayout::complete`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartialLayout {
    /// Tensor-parallel degree.
    pub tensor: Option<u32>,
    /// Context-parallel degree.
    pub context: Option<u32>,
    /// Pipeline ranks.
    pub pipeline: Option<u32>,
    /// Stages of each pipeline rank.
    pub virtual_stages: Option<u32>,
    /// Expert-parallel degree.
    pub expert: Option<u32>,
    /// Ranks that split each expert's products: 1, or as many as `tensor`.
    pub expert_tensor: Option<u32>,
    /// Ranks that share out state; as many as data times context unless given (hybrid sharding).
    pub shard_ranks: Option<u32>,
    /// Groups that ranks along the data axis form, each of which trains on its own for `local_steps`.
    pub local_groups: Option<u32>,
    /// Steps that groups take apart before their parameters meet in an outer update.
    pub local_steps: Option<u32>,
    /// Sequences in a microbatch.
    pub micro_batch: Option<u64>,
    /// In which order axes lie on accelerators.
    pub placement: Option<Placement>,
    /// What the data axis splits.
    pub shard: Option<Shard>,
    /// The order of a pipeline rank's turns.
    pub schedule: Option<Schedule>,
    /// Layers of every stage.
    pub stage_layers: Option<Vec<u32>>,
    /// Layers of the first pipeline rank, over all its stages.
    pub first_layers: Option<u32>,
    /// Layers of the last pipeline rank, over all its stages.
    pub last_layers: Option<u32>,
    /// Whether the embedding takes the place of a layer.
    pub embedding_is_layer: Option<bool>,
    /// Whether the head takes the place of a layer.
    pub head_is_layer: Option<bool>,
    /// What the forward pass does not keep.
    pub recompute: Option<Recompute>,
    /// Whether tensor-parallel ranks split the sequence between products.
    pub sequence_parallel: Option<bool>,
    /// How context-parallel ranks come to each other's keys and values.
    pub context_exchange: Option<ContextExchange>,
    /// How attention is carried out.
    pub attention: Option<AttentionKernel>,
    /// What hides the transfers of tensor parallelism.
    pub tensor_overlap: Option<TensorOverlap>,
    /// Whether gradients are reduced beside the backward pass.
    pub gradient_reduction: Option<Timing>,
    /// Whether parameters are gathered beside the first forward pass.
    pub parameter_gathering: Option<Timing>,
    /// Bytes of a parameter on its way.
    pub parameter_bytes: Option<u8>,
    /// Bytes of a parameter's gradient on its way.
    pub gradient_bytes: Option<u8>,
    /// Bytes of an activation on its way.
    pub activation_bytes: Option<u8>,
}

impl PartialLayout {
    /// A layout as a job file would give it.
    #[must_use]
    pub fn of(layout: &Layout) -> Self {
        let mesh = &layout.mesh;
        let unless_one = |degree: u32| (degree > 1).then_some(degree);
        let shared = mesh.context * mesh.data / mesh.replicas;
        let apart = layout.local_steps > 0;
        Self {
            tensor: Some(mesh.tensor),
            context: unless_one(mesh.context),
            pipeline: Some(mesh.pipeline),
            virtual_stages: unless_one(layout.virtual_stages),
            expert: unless_one(mesh.expert),
            expert_tensor: unless_one(mesh.expert_tensor),
            shard_ranks: (mesh.replicas > 1 && !apart).then_some(shared),
            local_groups: apart.then_some(mesh.replicas),
            local_steps: apart.then_some(layout.local_steps),
            micro_batch: Some(layout.micro_batch),
            placement: Some(mesh.placement).filter(|placement| *placement != Placement::default()),
            shard: Some(layout.shard),
            schedule: Some(layout.schedule.clone()),
            stage_layers: Some(layout.stage_layers.clone()).filter(|layers| !layers.is_empty()),
            recompute: Some(layout.recompute.clone()),
            sequence_parallel: (mesh.tensor > 1).then_some(layout.sequence_parallel),
            context_exchange: (mesh.context > 1).then_some(layout.context_exchange),
            attention: Some(layout.attention)
                .filter(|kernel| *kernel != AttentionKernel::default()),
            tensor_overlap: (mesh.tensor > 1).then_some(layout.tensor_overlap),
            gradient_reduction: Some(layout.gradient_reduction),
            parameter_gathering: Some(layout.parameter_gathering),
            parameter_bytes: Some(layout.parameter_bytes),
            gradient_bytes: Some(layout.gradient_bytes),
            activation_bytes: Some(layout.activation_bytes),
            ..Self::default()
        }
    }

    /// What it says of one rank, whatever is split.
    #[must_use]
    pub fn simplest(&self) -> Layout {
        let simplest = Layout::one_rank(self.micro_batch.unwrap_or(1));
        Layout {
            attention: self.attention.unwrap_or_default(),
            parameter_bytes: self.parameter_bytes.unwrap_or(4),
            gradient_bytes: self.gradient_bytes.unwrap_or(4),
            activation_bytes: self.activation_bytes.unwrap_or(4),
            ..simplest
        }
    }

    /// Fills in what was left out, for `ranks` ranks.
    ///
    /// Every degree 1 unless given; the optimizer sharded as soon as there is a data axis, since
    /// that moves no more bytes than an all-reduce; the sequence split wherever products are;
    /// microbatches of at most 4 sequences, and enough of them (4 a stage) to keep a pipeline's
    /// bubble small.
    ///
    /// # Errors
    /// What the ranks, the layers or the batch cannot be divided into.
    pub fn complete(
        &self,
        config: &Config,
        batch: &Batch,
        ranks: u32,
    ) -> Result<Layout, LayoutError> {
        let mesh = self.mesh(ranks)?;
        let virtual_stages = self.virtual_stages.unwrap_or(1);
        if virtual_stages == 0 {
            return Err(LayoutError::Zero("virtual_stages"));
        }
        let micro_batch = self.micro_batch.unwrap_or_else(|| default_micro_batch(&mesh, batch));
        let shares = mesh.data * mesh.context > 1;
        if self.local_groups.is_some() != self.local_steps.is_some() {
            return Err(LayoutError::Together(
                "local_groups says which ranks train apart and local_steps for how long; give both, or neither",
            ));
        }
        if self.local_groups.is_some() && self.shard_ranks.is_some() {
            return Err(LayoutError::Together(
                "state is shared out within each of local_groups; leave out shard_ranks",
            ));
        }
        let default_shard = if shares { Shard::Optimizer } else { Shard::None };
        let default_schedule = match virtual_stages {
            1 => Schedule::OneForwardOneBackward,
            _ => Schedule::Interleaved,
        };
        let simplest = Layout::new(mesh, micro_batch, self.shard.unwrap_or(default_shard));
        let layout = Layout {
            virtual_stages,
            local_steps: self.local_steps.unwrap_or_default(),
            stage_layers: self.stage_layers(config, mesh.pipeline, virtual_stages)?,
            schedule: self.schedule.clone().unwrap_or(default_schedule),
            recompute: self.recompute.clone().unwrap_or_default(),
            sequence_parallel: self.sequence_parallel.unwrap_or(mesh.tensor > 1),
            context_exchange: self.context_exchange.unwrap_or_default(),
            attention: self.attention.unwrap_or_default(),
            tensor_overlap: self.tensor_overlap.unwrap_or_default(),
            gradient_reduction: self.gradient_reduction.unwrap_or_default(),
            parameter_gathering: self.parameter_gathering.unwrap_or_default(),
            parameter_bytes: self.parameter_bytes.unwrap_or(4),
            gradient_bytes: self.gradient_bytes.unwrap_or(4),
            activation_bytes: self.activation_bytes.unwrap_or(4),
            ..simplest
        };
        layout.check(config, batch)?;
        Ok(layout)
    }

    fn mesh(&self, ranks: u32) -> Result<Mesh, LayoutError> {
        let given = |degree: Option<u32>| degree.unwrap_or(1);
        let (tensor, context) = (given(self.tensor), given(self.context));
        let (pipeline, expert) = (given(self.pipeline), given(self.expert));
        let expert_tensor = given(self.expert_tensor);
        let named = [
            ("tensor", tensor),
            ("context", context),
            ("pipeline", pipeline),
            ("expert", expert),
            ("expert_tensor", expert_tensor),
            ("shard_ranks", given(self.shard_ranks)),
            ("local_groups", given(self.local_groups)),
        ];
        if let Some((name, _)) = named.into_iter().find(|(_, degree)| *degree == 0) {
            return Err(LayoutError::Zero(name));
        }
        let model_ranks = tensor.saturating_mul(context).saturating_mul(pipeline);
        if !ranks.is_multiple_of(model_ranks) {
            return Err(LayoutError::Ranks { tensor, context, pipeline, ranks });
        }
        let data = ranks / model_ranks;
        let share = data * context;
        let groups = given(self.local_groups);
        if !data.is_multiple_of(groups) {
            return Err(LayoutError::divide(
                "local_groups",
                u64::from(groups),
                "the data degree",
                u64::from(data),
            ));
        }
        let shard_ranks = self.shard_ranks.unwrap_or(share / groups);
        if !share.is_multiple_of(shard_ranks) {
            let (degree, quantity) = (u64::from(shard_ranks), "data x context");
            return Err(LayoutError::divide("shard_ranks", degree, quantity, u64::from(share)));
        }
        let replicas = share / shard_ranks;
        let placement = self.placement.unwrap_or_default();
        Ok(Mesh { tensor, context, data, pipeline, expert, expert_tensor, replicas, placement })
    }

    /// Whether it says how layers are shared out among stages.
    pub(crate) fn shares_out_layers(&self) -> bool {
        let ends = self.first_layers.is_some() || self.last_layers.is_some();
        let places = self.embedding_is_layer.is_some() || self.head_is_layer.is_some();
        self.stage_layers.is_some() || ends || places
    }

    /// The layers of every stage; none if all have the same.
    pub(crate) fn stage_layers(
        &self,
        config: &Config,
        pipeline: u32,
        virtual_stages: u32,
    ) -> Result<Vec<u32>, LayoutError> {
        if let Some(layers) = &self.stage_layers {
            return Ok(layers.clone());
        }
        let sizes = RankLayers {
            pipeline,
            virtual_stages,
            ends: [self.first_layers, self.last_layers],
            places: [self.embedding_is_layer, self.head_is_layer]
                .map(|is_layer| u32::from(is_layer.unwrap_or(false))),
        };
        sizes.stages(config.layers)
    }
}

/// How layers are shared out when not all stages have the same.
struct RankLayers {
    pipeline: u32,
    virtual_stages: u32,
    /// Layers of the first and of the last rank, where they are given.
    ends: [Option<u32>; 2],
    /// Places of layers that the embedding takes on the first stage, and the head on the last.
    places: [u32; 2],
}

impl RankLayers {
    fn stages(&self, layers: u32) -> Result<Vec<u32>, LayoutError> {
        let stages = self.pipeline.saturating_mul(self.virtual_stages);
        if self.ends == [None, None] && self.places == [0, 0] {
            return Ok(Vec::new());
        }
        let given: u32 = self.ends.iter().flatten().sum();
        let ends = self.ends.iter().flatten().count() as u32;
        let places: u32 = self
            .places
            .iter()
            .zip(self.ends)
            .filter(|(_, end)| end.is_none())
            .map(|(p, _)| p)
            .sum();
        let others = (self.pipeline.saturating_sub(ends)) * self.virtual_stages;
        let left = layers.checked_sub(given).map(|left| left + places);
        let refused = || LayoutError::Stages { layers, stages, given, places };
        let left = left.ok_or_else(refused)?;
        if (others == 0 && left > 0) || (others > 0 && !left.is_multiple_of(others)) {
            return Err(refused());
        }
        let each = left.checked_div(others).unwrap_or(0);
        (0..stages).map(|stage| self.of_stage(stage, each).ok_or_else(refused)).collect()
    }

    /// Layers of one stage, where every stage that is not given has places for `each`.
    fn of_stage(&self, stage: u32, each: u32) -> Option<u32> {
        let (rank, chunk) = (stage % self.pipeline, stage / self.pipeline);
        let [first, last] = self.ends;
        let given = match rank {
            0 if first.is_some() => first,
            _ if rank + 1 == self.pipeline => last,
            _ => None,
        };
        if let Some(layers) = given {
            // The first stages of a rank take what does not divide.
            let (least, more) = (layers / self.virtual_stages, layers % self.virtual_stages);
            return Some(least + u32::from(chunk < more));
        }
        let mut taken = if stage == 0 { self.places[0] } else { 0 };
        if stage + 1 == self.pipeline * self.virtual_stages {
            taken += self.places[1];
        }
        each.checked_sub(taken)
    }
}

pub(crate) fn divisors(of: u64) -> impl Iterator<Item = u64> {
    (1..=of).filter(move |candidate| of.is_multiple_of(*candidate))
}

fn default_micro_batch(mesh: &Mesh, batch: &Batch) -> u64 {
    let per_rank = batch.global_batch / u64::from(mesh.data);
    let wanted = if mesh.pipeline > 1 { 4 * u64::from(mesh.pipeline) } else { 1 };
    (1..=4)
        .filter(|size| per_rank.is_multiple_of(*size) && per_rank / size >= wanted.min(per_rank))
        .max()
        .unwrap_or(1)
}
