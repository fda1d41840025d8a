//! Databases on the test servers that have TLS. Their certificate is for the name `localhost`, not for 127.0.0.1.

use std::process::Command;

use serde_json::{Value, json};

use super::{
    source::{PASSWORD, shell},
    unique, variable,
};

/// PEM of an authority: `ca` signed the servers' certificate, `other-ca` did not.
pub fn authority(name: &str) -> String {
    let file = std::path::Path::new(&variable("TLS_FOLDER")).join(name).with_extension("pem");
    std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

/// A source on the PostgreSQL that refuses every connection without TLS.
pub fn postgres() -> Value {
    let (name, port) = (unique("shop"), variable("TLS_POSTGRES_PORT"));
    let password = PASSWORD.replace('\'', "''");
    let psql = |database: &str, statements: &[&str]| {
        let url = format!("postgres://postgres:postgres@127.0.0.1:{port}/{database}?sslmode=require");
        let commands = statements.iter().flat_map(|s| ["-c", s]);
        let output = Command::new("psql").args(["-Xq", &url]).args(commands).output().expect("psql runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let role = format!("create role {name} login password '{password}'");
    psql("postgres", &[&role, &format!("create database {name} owner {name}")]);
    psql(
        &name,
        &["create table item as select generate_series(1, 100) as id", &format!("alter table item owner to {name}")],
    );
    config(&name, &port)
}

/// A source on the MariaDB with TLS; its user is refused without.
pub fn mariadb() -> Value {
    let (name, port) = (unique("shop"), variable("TLS_MARIADB_PORT"));
    let password = PASSWORD.replace('\\', "\\\\").replace('\'', "\\'");
    let statements = format!(
        "create database {name}; use {name}; create table item select seq from seq_1_to_100;
         create user {name}@'%' identified by '{password}' require ssl;
         grant all on {name}.* to {name}@'%'; grant select on mysql.proc to {name}@'%'"
    );
    let file = std::env::temp_dir().join(&name);
    std::fs::write(&file, statements).expect("writes");
    shell(&format!("mariadb --no-defaults --protocol=TCP -h 127.0.0.1 -P {port} -u root <'{}'", file.display()));
    std::fs::remove_file(file).expect("removes");
    config(&name, &port)
}

fn config(name: &str, port: &str) -> Value {
    let port: u16 = port.parse().expect("a port");
    json!({ "host": "localhost", "port": port, "username": name, "password": PASSWORD, "databases": [name] })
}
