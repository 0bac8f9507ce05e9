//! What is written for launchers: scripts that a shell reads, manifests with the job inside.

use std::process::Command;

use crate::place::{Place, over};

#[test]
fn scripts_hold_the_job_and_a_shell_can_read_them() {
    let place = Place::new();
    let job = over(4, "pipeline = 2\nmicro_batch = 2");
    place.write("job.toml", job + "\n[launch]\nranks_per_host = 2\naccount = \"science\"\n");
    let written = place.succeed(&[
        "launch",
        "job.toml",
        "--slurm",
        "--mpirun",
        "--torchrun",
        "--time",
        "2:00:00",
        "--set",
        "training.steps=7",
        "--out",
        "launch",
    ]);
    for name in ["job.sbatch", "mpirun.sh", "torchrun.sh"] {
        assert!(written.contains(name), "{written}");
        let path = place.path("launch").join(name);
        let checked = Command::new("bash").arg("-n").arg(&path).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        let text = std::fs::read_to_string(path).unwrap();
        let wanted = format!("train {} --set training.steps=7", place.path("job.toml").display());
        assert!(text.contains(&wanted), "{text}");
    }
    let script = std::fs::read_to_string(place.path("launch/job.sbatch")).unwrap();
    for option in ["nodes=2", "ntasks=4", "ntasks-per-node=2", "account=science", "time=2:00:00"] {
        assert!(script.contains(&format!("#SBATCH --{option}\n")), "{script}");
    }
}

#[test]
fn manifests_carry_the_job_file() {
    let place = Place::new();
    place.write("job.toml", over(4, "pipeline = 2\nmicro_batch = 2"));
    let text = place.succeed(&[
        "launch",
        "job.toml",
        "--kubernetes",
        "--ranks-per-host",
        "2",
        "--image",
        "registry.example/phalanx:1",
    ]);
    for words in ["kind: JobSet", "kind: TrainJob", "name: phalanx-job", "pipeline = 2"] {
        assert!(text.contains(words), "{words}:\n{text}");
    }
    let json = place.succeed(&["launch", "job.toml", "--mpirun", "--torchrun", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["mpirun.sh"].as_str().unwrap().contains("-np 4"), "{json}");
    for words in ["parallelism: 2", "numNodes: 2", "values: [2, 3, 5]", "phalanx-job-hosts-0-0"] {
        assert!(text.contains(words), "{words}:\n{text}");
    }
}

#[test]
fn what_cannot_be_launched_is_refused_before_it_queues() {
    let place = Place::new();
    place.write("job.toml", over(4, "pipeline = 2\nmicro_batch = 2"));
    for (arguments, reason) in [
        (&["--slurm", "--ranks-per-host", "3"][..], "ranks_per_host = 3 does not divide"),
        (&["--slurm", "--time", "an hour"], "is not minutes, HH:MM:SS or D-HH:MM:SS"),
        (&["--kubernetes"], "[launch] image is missing"),
        (&[], "say for which launcher"),
        (&["--slurm", "--set", "cluster.name=dgx-h100-quantum2"], "is described, not here"),
    ] {
        let refused = place.run(&[&["launch", "job.toml"], arguments].concat());
        let (code, error) = (refused.code, refused.stderr);
        assert!(code == Some(2) && error.contains(reason), "{arguments:?}: {error}");
    }
}
