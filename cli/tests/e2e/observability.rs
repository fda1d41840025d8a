//! The profile `observability` of the Compose file: its rules, its Prometheus on real processes, and its dashboards.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::harness::{
    Cluster, SOON,
    metrics::{Prometheus, profile, promtool},
    otlp::Receiver,
    source::PostgresSource,
    until,
};

#[test]
fn every_alert_has_a_test_of_when_it_fires_and_promtool_passes_all() {
    let path = |file: &str| profile(file).display().to_string();
    promtool(&["check", "config", &path("prometheus.yml")], "");
    promtool(&["test", "rules", &path("rules.test.yml")], "");
    let [rules, tests] =
        ["rules.yml", "rules.test.yml"].map(|file| std::fs::read_to_string(profile(file)).expect("rules"));
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 13, "{alerts:?}");
    for alert in alerts {
        assert!(tests.contains(&format!("labels: 'ALERTS{{alertname=\"{alert}\"")), "{alert} has no test");
    }
}

/// Every query of a dashboard, with the title of its panel.
fn queries(dashboard: &Value) -> Vec<(String, String)> {
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut found = Vec::new();
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        assert_eq!(panel["datasource"]["uid"], "prometheus", "{}", panel["title"]);
        for target in panel["targets"].as_array().expect("targets") {
            found.push((panel["title"].to_string(), target["expr"].as_str().expect("a query").to_owned()));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_scrapes_every_process_finds_the_run_by_its_exemplar_and_every_panel_has_data() {
    let receiver = Receiver::start().await;
    let cluster = Cluster::build()
        .env("DBACKUP_METRICS_LISTEN", "127.0.0.1:0")
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint)
        .start()
        .await;
    let source = PostgresSource::with_rows(100).await;
    let (destination, _) = cluster.local_destination().await;
    let more = json!({ "slug": "shop-daily", "expectEverySeconds": 3_600 });
    let job = cluster.job(&cluster.source("postgres", source.config()).await, &[&destination], more).await;
    let prometheus = Prometheus::start(&cluster).await;
    until("all four are scraped", SOON, || async {
        (prometheus.query("up{job=~\"dbackup-.*\"} == 1").await.len() == 4).then_some(())
    })
    .await;
    // The first look of Prometheus at a series must come before what increases it.
    let run = cluster.backup(&job).await;
    until("the exemplar of the run is there", SOON, || async {
        let span = [("query", "dbackup_run_duration_seconds_bucket"), ("start", "0"), ("end", "9999999999")];
        let found = prometheus.ask("/api/v1/query_exemplars", &span).await;
        let series = found.as_array()?.first()?;
        (series["exemplars"][0]["labels"]["trace_id"] == run["traceId"]).then_some(())
    })
    .await;
    let rules = prometheus.ask("/api/v1/rules", &[]).await;
    assert_eq!(rules["groups"].as_array().map(Vec::len), Some(3), "the rules are loaded: {rules}");

    let mut uids = BTreeSet::new();
    for file in ["overview.json", "job.json", "cluster.json"] {
        let text = std::fs::read(profile("grafana/dashboards").join(file)).expect("a dashboard");
        let dashboard: Value = serde_json::from_slice(&text).expect("JSON");
        uids.insert(dashboard["uid"].as_str().expect("a uid").to_owned());
        for (panel, query) in queries(&dashboard) {
            let query =
                query.replace("$__rate_interval", "30s").replace("$__range", "5m").replace("$backup_job", "shop-daily");
            assert!(!query.contains('$'), "{file} {panel}: {query}");
            until(&format!("{file} {panel} has data: {query}"), SOON, || async {
                (!prometheus.query(&query).await.is_empty()).then_some(())
            })
            .await;
        }
    }
    assert_eq!(uids.len(), 3);
    let sources = std::fs::read_to_string(profile("grafana/provisioning/datasources/datasources.yml")).expect("text");
    for uid in ["uid: prometheus", "uid: jaeger", "datasourceUid: jaeger"] {
        assert!(sources.contains(uid), "{uid}");
    }
}
