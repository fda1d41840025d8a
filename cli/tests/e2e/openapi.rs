//! The OpenAPI document and the reference page.

use std::{collections::BTreeSet, path::Path};

use serde_json::Value;

use crate::harness::Cluster;

/// Routes that belong to the document itself.
const ABOUT_ITSELF: [&str; 4] = ["/api/openapi.json", "/api/docs", "/api/docs/", "/api/docs/{*file}"];

fn operations(document: &Value) -> BTreeSet<(String, String)> {
    let paths = document["paths"].as_object().expect("paths");
    let of_path = |(path, item): (&String, &Value)| -> Vec<(String, String)> {
        item.as_object().expect("an item").keys().map(|method| (method.to_uppercase(), path.clone())).collect()
    };
    paths.iter().flat_map(of_path).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_document_has_every_route_of_the_table_and_no_other_and_is_the_committed_one() {
    let cluster = Cluster::build().workers(0).start().await;
    let response = cluster.http.get(format!("{}/api/openapi.json", cluster.url(0))).send().await.expect("answers");
    assert_eq!(response.status(), 200, "open to everybody");
    let document: Value = response.json().await.expect("JSON");
    assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")), "{}", document["openapi"]);
    let table: BTreeSet<(String, String)> = api::router::table()
        .iter()
        .filter(|route| !ABOUT_ITSELF.contains(&route.path))
        .map(|route| (route.method.to_string(), route.path.to_owned()))
        .collect();
    assert_eq!(operations(&document), table);
    let mut ids = BTreeSet::new();
    for (method, path) in &table {
        let operation = &document["paths"][path][method.to_lowercase()];
        assert!(
            ids.insert(operation["operationId"].as_str().expect("an id")),
            "{method} {path}: its operationId is another's"
        );
        let responses = operation["responses"].as_object().expect("responses");
        for status in ["400", "500", "503"] {
            let schema = &responses[status]["content"]["application/json"]["schema"]["$ref"];
            assert_eq!(schema, "#/components/schemas/Failure", "{method} {path} {status}");
        }
        assert!(operation["security"].is_array() && operation["summary"].is_string(), "{method} {path}");
        let secured = operation["security"] != serde_json::json!([{}]);
        assert_eq!(
            secured,
            responses.contains_key("401") && !operation["security"][0].as_object().is_some_and(|s| s.is_empty()),
            "{method} {path}"
        );
    }
    let schemes = document["components"]["securitySchemes"].as_object().expect("schemes");
    assert_eq!(schemes.keys().collect::<Vec<_>>(), ["apiKey", "session"]);
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let committed: Value = serde_json::from_slice(&std::fs::read(committed).expect("docs/openapi.json")).expect("JSON");
    assert!(document == committed, "docs/openapi.json is not what the handlers say: run make openapi and commit it");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reference_page_loads_nothing_from_elsewhere() {
    let cluster = Cluster::build().workers(0).start().await;
    let page = cluster.http.get(format!("{}/api/docs", cluster.url(0))).send().await.expect("answers");
    assert_eq!((page.status().as_u16(), page.url().path()), (200, "/api/docs/"));
    let policy = page.headers()["content-security-policy"].to_str().expect("text").to_owned();
    assert!(policy.starts_with("default-src 'none'; script-src 'self'; ") && !policy.contains("http"), "{policy}");
    let text = page.text().await.expect("a page");
    let mut files = 0;
    for piece in text.split(['"', '\'']).filter(|piece| [".js", ".css", ".png"].iter().any(|end| piece.ends_with(end)))
    {
        assert!(!piece.contains("//"), "{piece} is elsewhere");
        let path = piece.trim_start_matches("./");
        let file = cluster.http.get(format!("{}/api/docs/{path}", cluster.url(1))).send().await.expect("answers");
        assert_eq!(file.status(), 200, "{piece}");
        files += 1;
    }
    assert!(files >= 4, "{text}");
    let start =
        cluster.http.get(format!("{}/api/docs/swagger-initializer.js", cluster.url(0))).send().await.expect("answers");
    assert!(start.text().await.expect("text").contains("/api/openapi.json"));
    let nothing =
        cluster.http.get(format!("{}/api/docs/no-such-file.js", cluster.url(0))).send().await.expect("answers");
    assert_eq!(nothing.status(), 404);
}
