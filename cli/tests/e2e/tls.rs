//! Sources over TLS: what each mode demands of the server, and what is told when it is not so.

use serde_json::{Value, json};

use crate::harness::{
    Cluster, SOON, files,
    source::{MariadbSource, PostgresSource},
    tls::{self, authority},
};

/// A config with this mode and authority, at this host.
fn with(config: &Value, mode: &str, ca: Option<&str>, host: &str) -> Value {
    let mut config = config.clone();
    config["host"] = json!(host);
    config["tls"] = json!({ "mode": mode, "caCertificate": ca.map(authority) });
    config
}

/// A run that could be tried three times.
async fn run(cluster: &Cluster, engine: &str, config: Value) -> Value {
    let (destination, root) = cluster.local_destination().await;
    let source = cluster.source(engine, config).await;
    let job = cluster.job(&source, &[&destination], json!({ "maxAttempts": 3 })).await;
    let ended = cluster.ended(&cluster.trigger(&job).await, SOON).await;
    assert_eq!(files(&root).len(), if ended["status"] == "Success" { 2 } else { 0 }, "{ended:#}");
    ended
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_dumped_over_tls_where_the_server_is_what_the_mode_demands() {
    let cluster = Cluster::start().await;
    for (engine, config) in [("postgres", tls::postgres()), ("mariadb", tls::mariadb())] {
        for (mode, ca) in [("verify-full", Some("ca")), ("verify-ca", Some("ca")), ("require", None), ("prefer", None)]
        {
            let ended = run(&cluster, engine, with(&config, mode, ca, "localhost")).await;
            assert_eq!(ended["status"], "Success", "{engine} {mode}: {ended:#}");
        }
        // It is TLS that made the difference: both servers turn these users away without.
        let ended = run(&cluster, engine, with(&config, "disable", None, "localhost")).await;
        assert_eq!(ended["errorCode"], "source_auth", "{engine}: {ended:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_does_not_fit_ends_the_run_at_once_and_says_what_to_check() {
    let cluster = Cluster::start().await;
    for (engine, config) in [("postgres", tls::postgres()), ("mariadb", tls::mariadb())] {
        for (mode, ca, host) in [
            ("verify-full", "other-ca", "localhost"),
            ("verify-ca", "other-ca", "localhost"),
            ("verify-full", "ca", "127.0.0.1"),
        ] {
            let ended = run(&cluster, engine, with(&config, mode, Some(ca), host)).await;
            let case = format!("{engine} {mode} {ca} {host}");
            assert_eq!(
                (ended["errorCode"].as_str(), ended["attempt"].as_i64()),
                (Some("source_tls"), Some(1)),
                "{case}: {ended:#}"
            );
            assert!(ended["error"].as_str().is_some_and(|e| e.contains("caCertificate")), "{case}: {ended:#}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_that_is_demanded_is_not_given_up_for_a_server_that_has_none() {
    let cluster = Cluster::start().await;
    let (postgres, mariadb) = (PostgresSource::empty().await.config(), MariadbSource::with_rows(1).config());
    for (engine, config) in [("postgres", postgres), ("mariadb", mariadb)] {
        for (mode, ca) in [("require", None), ("verify-ca", Some("ca")), ("verify-full", Some("ca"))] {
            let ended = run(&cluster, engine, with(&config, mode, ca, "localhost")).await;
            assert_eq!(
                (ended["errorCode"].as_str(), ended["attempt"].as_i64()),
                (Some("source_tls"), Some(1)),
                "{engine} {mode}: {ended:#}"
            );
        }
        let ended = run(&cluster, engine, with(&config, "prefer", None, "localhost")).await;
        assert_eq!(ended["status"], "Success", "{engine}: {ended:#}");
    }
}
