//! Manifests for Kubernetes: a JobSet (jobset.x-k8s.io/v1alpha2), and a TrainJob of Kubeflow's
//! trainer (trainer.kubeflow.org/v1alpha1) on its torch-distributed runtime; both as of 2026-08.

use super::{Plan, label, made_from};

/// Where rank 0 listens.
const PORT: u16 = 29_500;
/// Where the claim is mounted, and paths of the job begin.
const PLACE: &str = "/work";
/// Seconds that ranks have to save after they were asked to stop.
const GRACE: u32 = 120;

/// Starts the ranks of one host and ends with the highest of their exit codes. A signal to stop is
/// handed on; each rank saves and ends with 4.
fn host(plan: &Plan<'_>, host_number: &str) -> String {
    let (ranks, each) = (plan.job.cluster.accelerators, plan.ranks_per_host);
    let (text, resume) = (plan.text.trim_end(), plan.resume());
    let command = plan.command(&format!("/tmp/{}.toml", plan.job.name));
    let file = super::quoted(&format!("/tmp/{}.toml", plan.job.name));
    format!(
        "phalanx=phalanx\n\
         cat > {file} <<'JOB_FILE'\n{text}\nJOB_FILE\n\
         # Pods are replaced unasked: go on from the newest run that did not finish.\n\
         resume=()\n{resume}\
         ranks=()\n\
         trap 'kill -TERM \"${{ranks[@]}}\"' TERM\n\
         for local in $(seq 0 {last}); do\n    \
         RANK=$(({host_number} * {each} + local)) WORLD_SIZE={ranks} LOCAL_RANK=$local LOCAL_WORLD_SIZE={each} {command} \"${{resume[@]}}\" &\n    \
         ranks+=($!)\n\
         done\n\
         highest=0\n\
         for rank in \"${{ranks[@]}}\"; do\n    \
         wait \"$rank\"\n    \
         code=$?\n    \
         while kill -0 \"$rank\" 2>/dev/null; do\n        \
         wait \"$rank\"\n        \
         code=$?\n    \
         done\n    \
         [ \"$code\" -gt \"$highest\" ] && highest=$code\n\
         done\n\
         exit \"$highest\"\n",
        last = each - 1,
    )
}

/// A text as a block of YAML, so many spaces in.
fn block(text: &str, spaces: usize) -> String {
    let line = |line: &str| match line {
        "" => "\n".to_owned(),
        _ => format!("{:spaces$}{line}\n", ""),
    };
    text.lines().map(line).collect()
}

/// What a host must have: the cores of its ranks, and a GPU for each where they use one.
fn resources(plan: &Plan<'_>, spaces: usize) -> String {
    let cores = plan.ranks_per_host * plan.job.cluster.threads_per_rank;
    let gpus = match plan.uses_gpus() {
        true => format!("limits:\n  nvidia.com/gpu: {}\n", plan.ranks_per_host),
        false => String::new(),
    };
    block(&format!("requests:\n  cpu: {cores}\n{gpus}"), spaces)
}

/// A JobSet of one pod a host. All its pods are started anew together, as often as the job's
/// `[recovery] restarts` says, but not after what would be the same again.
pub fn jobset(plan: &Plan<'_>, image: &str) -> String {
    let (name, hosts) = (label(&plan.job.name), plan.hosts);
    let (made, restarts) = (made_from(&plan.path), plan.job.recovery.restarts);
    let script = block(&host(plan, "JOB_COMPLETION_INDEX"), 20);
    let resources = resources(plan, 20);
    let volume = match &plan.section.claim {
        Some(claim) => format!("persistentVolumeClaim:\n  claimName: {claim}\n"),
        None => "emptyDir: {}\n".to_owned(),
    };
    let volume = block(&volume, 14);
    format!(
        "{made}# First, once: kubectl create secret generic {name} --from-literal=secret=\"$(openssl rand -hex 32)\"
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
spec:
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: {restarts}
    rules:
    - name: the-same-again
      action: FailJobSet
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: hosts
    replicas: 1
    template:
      spec:
        parallelism: {hosts}
        completions: {hosts}
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          # Bad input, a bug, ranks lost again and again.
          - action: FailJob
            onExitCodes:
              containerName: ranks
              operator: In
              values: [2, 3, 5]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: {GRACE}
            containers:
            - name: ranks
              image: {image}
              workingDir: {PLACE}
              env:
              - name: MASTER_ADDR
                value: {name}-hosts-0-0.{name}
              - name: MASTER_PORT
                value: \"{PORT}\"
              - name: PHALANX_SECRET
                valueFrom:
                  secretKeyRef:
                    name: {name}
                    key: secret
              command:
              - bash
              - -c
              - |
{script}              resources:
{resources}              volumeMounts:
              - name: work
                mountPath: {PLACE}
              - name: memory
                mountPath: /dev/shm
            volumes:
            - name: work
{volume}            - name: memory
              emptyDir:
                medium: Memory
"
    )
}

/// A `TrainJob`. Its volumes are those of the runtime.
pub fn trainjob(plan: &Plan<'_>, image: &str) -> String {
    let (name, hosts, each) = (label(&plan.job.name), plan.hosts, plan.ranks_per_host);
    let made = made_from(&plan.path);
    let addresses = "export MASTER_ADDR=$PET_MASTER_ADDR MASTER_PORT=$PET_MASTER_PORT\n";
    let script = block(&format!("{addresses}{}", host(plan, "PET_NODE_RANK")), 8);
    let resources = resources(plan, 6);
    format!(
        "{made}# First, once: kubectl create secret generic {name} --from-literal=secret=\"$(openssl rand -hex 32)\"
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {name}
spec:
  runtimeRef:
    name: torch-distributed
  trainer:
    image: {image}
    numNodes: {hosts}
    numProcPerNode: {each}
    env:
    - name: PHALANX_SECRET
      valueFrom:
        secretKeyRef:
          name: {name}
          key: secret
    command:
    - bash
    - -c
    - |
{script}    resourcesPerNode:
{resources}"
    )
}
