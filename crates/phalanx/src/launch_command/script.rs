//! Scripts of a shell: for sbatch, around mpirun, around torchrun.

use super::{Plan, made_from};

/// Seconds before the end of its time at which a job is asked to save and stop.
const GRACE: u32 = 120;
/// A secret for this job alone, unless there is one: ranks refuse strangers.
const SECRET: &str = "export PHALANX_SECRET=${PHALANX_SECRET:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n')}\n";
const HEAD: &str = "phalanx=${PHALANX:-phalanx}\n";

/// A job of Slurm. It saves and is queued again when its time is over, and goes on from there; what
/// starting again would not help (exit codes 1, 2, 3 and 5) ends it.
pub fn slurm(plan: &Plan<'_>) -> String {
    let section = &plan.section;
    let mut options = vec![
        format!("job-name={}", plan.job.name),
        format!("nodes={}", plan.hosts),
        format!("ntasks={}", plan.job.cluster.accelerators),
        format!("ntasks-per-node={}", plan.ranks_per_host),
        format!("cpus-per-task={}", plan.job.cluster.threads_per_rank),
    ];
    options.extend(plan.uses_gpus().then(|| "gpus-per-task=1".to_owned()));
    for (name, value) in
        [("time", &section.time), ("account", &section.account), ("partition", &section.partition)]
    {
        options.extend(value.as_ref().map(|value| format!("{name}={value}")));
    }
    options.push(format!("signal=B:USR1@{GRACE}"));
    options.extend(["requeue", "open-mode=append", "output=%x-%j.log"].map(str::to_owned));
    let options: String = options.iter().map(|option| format!("#SBATCH --{option}\n")).collect();
    let resume: String = plan.resume().lines().map(|line| format!("    {line}\n")).collect();
    let made = made_from(&plan.path);
    let command = plan.command(&plan.path.to_string_lossy());
    format!(
        "#!/usr/bin/env bash\n{made}{options}\n\
         {HEAD}{SECRET}\
         # Queued again: go on from the newest run that did not finish.\n\
         resume=()\n\
         if [ \"${{SLURM_RESTART_COUNT:-0}}\" -gt 0 ]; then\n{resume}fi\n\n\
         srun {command} \"${{resume[@]}}\" &\n\
         ranks=$!\n\
         asked=0\n\
         # srun would kill what it started, so the ranks are told past it.\n\
         trap 'asked=1; scancel --signal=TERM \"$SLURM_JOB_ID.0\"' USR1\n\
         wait \"$ranks\"\n\
         code=$?\n\
         # A signal ends the first wait; the ranks save and stop.\n\
         if [ \"$asked\" -eq 1 ]; then\n    \
         wait \"$ranks\"\n    \
         code=$?\n\
         fi\n\
         # 4: stopped as asked and saved. Other codes would be the same again.\n\
         if [ \"$asked\" -eq 1 ] && [ \"$code\" -eq 4 ]; then\n    \
         scontrol requeue \"$SLURM_JOB_ID\"\n\
         fi\n\
         exit \"$code\"\n"
    )
}

/// A call of Open MPI's mpirun, inside an allocation or with a host file in `$@`.
pub fn mpirun(plan: &Plan<'_>) -> String {
    let (ranks, each) = (plan.job.cluster.accelerators, plan.ranks_per_host);
    let (made, command) = (made_from(&plan.path), plan.command(&plan.path.to_string_lossy()));
    let master = match plan.hosts {
        1 => String::new(),
        _ => "# Where rank 0 listens: the first host.\n\
              export MASTER_ADDR=${MASTER_ADDR:?set it to the address of the first host}\n"
            .to_owned(),
    };
    let export = if plan.hosts > 1 { " -x MASTER_ADDR" } else { "" };
    format!(
        "#!/usr/bin/env bash\n{made}# Options for mpirun go behind: --hostfile FILE, ...\n\
         {HEAD}{SECRET}{master}\
         exec mpirun -np {ranks} --map-by ppr:{each}:node -x PHALANX_SECRET{export} \"$@\" {command}\n"
    )
}

/// A call of torchrun, to be started on every host.
pub fn torchrun(plan: &Plan<'_>) -> String {
    let (hosts, each) = (plan.hosts, plan.ranks_per_host);
    let (made, command) = (made_from(&plan.path), plan.command(&plan.path.to_string_lossy()));
    let (meet, secret) = match hosts {
        1 => ("--standalone".to_owned(), SECRET),
        _ => (
            "--rdzv-backend c10d --rdzv-id phalanx --rdzv-endpoint \"${MASTER_ADDR:?set it to the address of one of the hosts}:${MASTER_PORT:-29500}\"".to_owned(),
            "export PHALANX_SECRET=${PHALANX_SECRET:?set it to the same secret on every host}\n",
        ),
    };
    format!(
        "#!/usr/bin/env bash\n{made}# Start it on each of {hosts} host(s).\n\
         {HEAD}{secret}\
         exec torchrun --no-python --nnodes {hosts} --nproc-per-node {each} {meet} {command}\n"
    )
}
