//! Every list of the API is paged by cursor, and what is inserted between two pages shifts nothing; the overview is of such lists.

use std::collections::BTreeSet;

use serde_json::json;

use crate::harness::{Cluster, history::questions, id, source::PostgresSource, unique};

const PASSWORD: &str = "correct horse battery";

/// Makes one more thing of every list.
async fn one_more(cluster: &Cluster) {
    let config = json!({ "host": "db.example.com", "username": "u", "databases": ["shop"] });
    let source = cluster.source("postgres", config).await;
    let body = json!({ "name": unique("store"), "kind": "local", "config": { "root": cluster.scratch } });
    let destination = id(&cluster.ok("POST", "/api/destinations", Some(body)).await);
    let job = cluster.job(&source, &[&destination], json!({})).await;
    cluster.trigger(&job).await;
    cluster.key(&["jobs:read"]).await;
    let webhook = json!({ "name": "On call", "url": "https://hooks.example.com/x" });
    cluster.ok("POST", "/api/webhooks", Some(webhook)).await;
    let name = unique("user");
    let body = json!({ "name": name, "password": PASSWORD, "permissions": ["jobs:read"] });
    cluster.ok("POST", "/api/users", Some(body)).await;
    cluster.ok("POST", "/api/session", Some(json!({ "name": name, "password": PASSWORD }))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_list_is_paged_and_an_insert_between_two_pages_shifts_nothing() {
    let cluster = Cluster::build().workers(0).start().await;
    let lists: Vec<&str> = questions()
        .into_iter()
        .filter(|path| {
            !["/api/cluster", "/api/destination-kinds", "/api/engines", "/api/events", "/api/session", "/api/settings"]
                .contains(path)
        })
        .collect();
    assert!(lists.len() >= 8, "{lists:?}");
    for _ in 0..5 {
        one_more(&cluster).await;
    }
    for list in lists {
        let (before, _) = cluster.page(&format!("{list}?limit=1000")).await;
        assert!(before.len() >= 5, "{list}: {before:?}");
        let (mut seen, mut next) = (Vec::new(), Some(format!("{list}?limit=2")));
        while let Some(path) = next.filter(|_| seen.len() < before.len()) {
            let (page, after) = cluster.page(&path).await;
            assert!(page.len() <= 2, "{path}: {page:?}");
            if seen.is_empty() {
                one_more(&cluster).await;
            }
            seen.extend(page);
            next = after;
        }
        seen.truncate(before.len());
        assert_eq!(seen, before, "{list}: each once, in order");
        assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), before.len(), "{list}");
        for bad in ["limit=0", "limit=1001", "limit=x", "cursor=x"] {
            let (status, answer) = cluster.request("GET", &format!("{list}?{bad}"), None).await;
            assert_eq!(status, 400, "{list}?{bad}: {answer}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_overview_shows_the_last_failure_however_much_was_cancelled_since() {
    let cluster = Cluster::build().workers(0).start().await;
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let body = json!({ "name": "Store", "kind": "local", "config": { "root": cluster.scratch } });
    let destination = id(&cluster.ok("POST", "/api/destinations", Some(body)).await);
    let job = cluster.job(&source, &[&destination], json!({ "overlap": "allow" })).await;
    let failed = cluster.trigger(&job).await;
    let fail = format!(
        "with failed as (update executions set status = 'Failed', ended_at = now(), error = 'the disk broke' where id = '{failed}' returning 1)
         select count(*) from failed"
    );
    assert_eq!(cluster.count(&fail).await, 1);
    for _ in 0..9 {
        let id = cluster.trigger(&job).await;
        cluster.ok("POST", &format!("/api/executions/{id}/cancel"), None).await;
    }
    let page = cluster.http.get(cluster.url(0)).bearer_auth(&cluster.admin_key).send().await.expect("answers");
    let page = page.text().await.expect("a page");
    assert!(page.contains(&failed) && page.contains("the disk broke"), "{page}");
}
