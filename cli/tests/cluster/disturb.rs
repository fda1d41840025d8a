//! Workers are killed, and paused for longer than their lease, in each stage of a run.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::{
    harness::until,
    project::{A_WHILE, Project, docker, try_docker},
    stages::Stage,
};

/// What all lanes share.
#[derive(Default)]
struct Shared {
    /// Disturbances begun.
    begun: AtomicUsize,
    /// Containers that somebody disturbs just now.
    busy: Mutex<HashSet<String>>,
    /// How often what was done.
    done: Mutex<BTreeMap<String, usize>>,
}

/// Disturbs so often; each stage has a lane of its own, so that every worker may be away at once. Gives how often
/// what was done.
pub async fn workers(project: &Project, stages: &Arc<Vec<Stage>>, times: usize) -> BTreeMap<String, usize> {
    let shared = Arc::new(Shared::default());
    let mut lanes = tokio::task::JoinSet::new();
    for at in 0..stages.len() {
        let (project, stages, shared) = (project.clone(), stages.clone(), shared.clone());
        lanes.spawn(async move {
            let mut pause = at % 2 == 0;
            while shared.begun.fetch_add(1, Ordering::SeqCst) < times {
                pause = !pause;
                disturb(&project, &stages[at], &shared, pause).await;
            }
        });
    }
    while let Some(lane) = lanes.join_next().await {
        lane.expect("a lane ends well");
    }
    let done = shared.done.lock().expect("not poisoned").clone();
    assert_eq!(done.values().sum::<usize>(), times, "{done:?}");
    // Of few, some lane may have had one alone.
    if times >= 40 {
        assert_eq!(done.len(), 2 * stages.len(), "killed and paused in each stage: {done:?}");
    }
    done
}

/// Waits until an execution is in the stage on a worker that nobody else disturbs; gives its container. `None` when the
/// other lanes have hit the run so often that it was closed as lost.
async fn reserve(project: &Project, stage: &Stage, shared: &Shared, execution: &str) -> Option<String> {
    until(&format!("{execution} is {} on a worker that nobody else disturbs", stage.name), 2 * A_WHILE, || async {
        match project.worker_in(execution, stage.name).await {
            Some(worker) => {
                let container = project.container_of(&worker).await;
                shared.busy.lock().expect("not poisoned").insert(container.clone()).then_some(Some(container))
            }
            None => project.end_of(execution).await.map(|_| None),
        }
    })
    .await
}

async fn disturb(project: &Project, stage: &Stage, shared: &Shared, pause: bool) {
    let (execution, container) = loop {
        stage.close();
        let execution = stage.begin(project).await;
        if let Some(container) = reserve(project, stage, shared, &execution).await {
            break (execution, container);
        }
    };
    let before = project.leases_ended(&execution).await;
    match pause {
        true => pause_container(&container).await,
        false => drop(docker(&["kill", "--signal", "KILL", &container]).await),
    }
    // Both are longer than the lease: the run is another's by then, or waits for one.
    until(&format!("the run of {container} is taken from it"), A_WHILE, || async {
        (project.leases_ended(&execution).await > before).then_some(())
    })
    .await;
    let end = if pause { "unpause" } else { "start" };
    docker(&[end, &container]).await;
    stage.open();
    let end = project.ended(&execution).await;
    // What a restore has brought back is looked at in the end. Another lane may have paused the worker that it went to.
    let overtaken = stage.restores.is_some() && end.is_overtaken();
    assert!(end.is_success() || end.is_lost() || overtaken, "{execution} of {} ended so: {end:?}", stage.name);
    let what = if pause { "paused" } else { "killed" };
    *shared.done.lock().expect("not poisoned").entry(format!("{what} in {}", stage.name)).or_default() += 1;
    // A worker that was started again must claim before it is worth another disturbance.
    tokio::time::sleep(Duration::from_millis(500)).await;
    shared.busy.lock().expect("not poisoned").remove(&container);
}

/// On a busy machine the kernel does not freeze every process of a container at once, and Docker gives up and lets it go on.
async fn pause_container(container: &str) {
    until(&format!("{container} is paused"), A_WHILE, || async {
        match try_docker(&["pause", container]).await {
            Ok(_) => Some(()),
            Err(said) if said.contains("unable to freeze") => None,
            Err(said) => panic!("docker pause {container}: {said}"),
        }
    })
    .await;
}
