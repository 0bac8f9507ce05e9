//! `phalanx plan`: how a job is laid out, and the program it becomes.

use anyhow::Result;
use plan::lower;
use program::Program;
use serde_json::json;
use units::Rank;

use crate::JobArgs;
use crate::job::Job;
use crate::output::thousands;

/// Prints the layout, and with `show_program` every instruction.
pub fn plan(args: &JobArgs, show_program: bool) -> Result<()> {
    let job = Job::read(&args.job, &args.set)?;
    let program = lowered(&job)?;
    if args.json {
        let description = json!({
            "parameters": job.model.parameter_count(),
            "layout": job.layout,
            "ranks": job.layout.mesh.ranks(),
            "microbatches": program.microbatches,
            "flops_per_step": (0..program.classes.len())
                .map(|class| program.flops(class).0 * u64::from(job.layout.mesh.data))
                .sum::<u64>(),
            "program": show_program.then(|| program.to_string()),
        });
        println!("{}", serde_json::to_string_pretty(&description)?);
        return Ok(());
    }
    print!("{}", describe(&job, &program));
    for stage in 0..job.layout.mesh.pipeline {
        let first = job.layout.mesh.peer(Rank(0), program::Axis::Pipeline, stage);
        let blocks = program.held_blocks(first);
        let elements: u64 = blocks.iter().map(|block| program.blocks[block]).sum();
        println!(
            "stage {stage}        {} to {}: {} parameters, {} a step, {} handed to transfers",
            blocks[0],
            blocks[blocks.len() - 1],
            thousands(elements),
            program.flops(stage as usize),
            program.transferred(stage as usize),
        );
    }
    if show_program {
        println!("\n{program}");
    }
    Ok(())
}

/// The job's program, proved sound.
pub fn lowered(job: &Job) -> Result<Program> {
    let program = lower(&job.model, &job.layout, &job.batch())?;
    assert_eq!(program.verify(), Ok(()), "what is lowered verifies");
    Ok(program)
}

/// The model and the layout in two lines.
pub fn describe(job: &Job, program: &Program) -> String {
    let model = &job.model;
    let shard = format!("{:?}", job.layout.shard).to_lowercase();
    format!(
        "model          {} parameters: {} layers, hidden {}, {} heads ({} kv), feed-forward {}, vocabulary {}\n\
         layout         {}, shard {shard}, {} microbatch(es) of {} x {} tokens a rank, {} tokens a step\n",
        thousands(model.parameter_count()),
        model.layers,
        model.hidden,
        model.heads,
        model.kv_heads,
        model.feed_forward,
        model.vocabulary,
        job.layout.mesh,
        program.microbatches,
        program.shape.sequences,
        program.shape.sequence,
        thousands(program.global_tokens()),
    )
}
