//! Databases with real rows on the test servers.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

use super::{Cluster, id, mariadb_port, postgres_url, sql, unique};

/// A password that every quoting rule trips over.
pub const PASSWORD: &str = "p'w \"#$\\%s;";

/// A PostgreSQL database with a role that may read it.
pub struct PostgresSource {
    /// Its name.
    pub database: String,
    /// Its role; the password is [`PASSWORD`].
    pub role: String,
    /// Port of the server.
    pub port: u16,
}

impl PostgresSource {
    /// Two tables: `rows` rows of about 100 bytes that do not compress well, and one of odd values.
    pub async fn with_rows(rows: u32) -> Self {
        let source = Self::empty().await;
        sql(
            &source.database,
            &format!(
                "create table item as select i as id, md5(i::text) || md5((i * 7)::text) || md5((i * 13)::text) as text from generate_series(1, {rows}) i;
                 create table odd (id int primary key, t text, b bytea, j jsonb, at timestamptz);
                 insert into odd values (1, E'quote '' back\\\\ tab\\t', '\\x00ff', '{{\"a\": [1, null]}}', '2025-01-15 10:30:00+00'), (2, null, null, null, null);
                 alter table item owner to {role}; alter table odd owner to {role};",
                role = source.role
            ),
        )
        .await;
        source
    }

    /// A database without tables.
    pub async fn empty() -> Self {
        let (database, role) = (unique("shop"), unique("reader"));
        let password = PASSWORD.replace('\'', "''");
        sql("postgres", &format!("create role {role} login password '{password}'")).await;
        sql("postgres", &format!("create database {database} owner {role}")).await;
        let url = url::Url::parse(&postgres_url("postgres")).expect("a URL");
        Self { database, role, port: url.port().expect("a port") }
    }

    /// As a source's config.
    pub fn config(&self) -> Value {
        self.config_at(self.port)
    }

    /// Through another port.
    pub fn config_at(&self, port: u16) -> Value {
        json!({ "host": "127.0.0.1", "port": port, "username": self.role, "password": PASSWORD, "databases": [self.database] })
    }

    /// Restores a stored dump into an empty database by the public tools; gives its name.
    pub async fn restore(&self, file: &Path) -> String {
        self.restore_by("zstd -dc", file).await
    }

    /// As [`PostgresSource::restore`], for a dump that another command unpacks.
    pub async fn restore_by(&self, unpack: &str, file: &Path) -> String {
        let target = unique("restored");
        sql("postgres", &format!("create database {target} owner {}", self.role)).await;
        let script =
            format!("{unpack} '{}' | pg_restore --exit-on-error -d '{}'", file.display(), postgres_url(&target));
        shell(&script);
        target
    }

    /// Demands that every table of `other` is as ours.
    pub async fn assert_same(&self, other: &str) {
        let digest = |database: String| async move {
            let script = "select string_agg(x, E'\\n' order by x) from (
                select 'item ' || count(*) || ' ' || coalesce(md5(string_agg(item::text, '|' order by id)), '') as x from item
                union all select 'odd ' || count(*) || ' ' || coalesce(md5(string_agg(odd::text, '|' order by id)), '') from odd) t";
            psql(&database, script)
        };
        let (ours, theirs) = (digest(self.database.clone()).await, digest(other.to_owned()).await);
        assert!(ours.contains("item ") && ours == theirs, "{ours}\n{theirs}");
    }
}

/// Output of a query.
pub fn psql(database: &str, query: &str) -> String {
    let output =
        Command::new("psql").args(["-XAtq", &postgres_url(database), "-c", query]).output().expect("psql runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Whether a database holds a text anywhere, as text or as bytes.
pub fn holds(database: &str, text: &str) -> bool {
    let dump = shell(&format!("pg_dump '{}'", postgres_url(database))).stdout;
    let dump = String::from_utf8_lossy(&dump);
    dump.contains(text) || dump.contains(&hex::encode(text))
}

/// Runs a shell pipeline that must succeed.
pub fn shell(script: &str) -> Output {
    let output =
        Command::new("bash").args(["-o", "pipefail", "-c", script]).stdin(Stdio::null()).output().expect("bash runs");
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    output
}

/// A MariaDB database with a user that may read it.
pub struct MariadbSource {
    /// Its name.
    pub database: String,
    /// Its user; the password is [`PASSWORD`].
    pub user: String,
}

/// Runs SQL as root.
pub fn mariadb(database: &str, statements: &str) -> String {
    let port = mariadb_port().to_string();
    let output = Command::new("mariadb")
        .args([
            "--no-defaults",
            "--protocol=TCP",
            "-h",
            "127.0.0.1",
            "-P",
            &port,
            "-u",
            "root",
            "--default-character-set=utf8mb4",
            "-N",
            "-B",
            "-e",
            statements,
            database,
        ])
        .output()
        .expect("mariadb runs");
    assert!(output.status.success(), "{statements}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

impl MariadbSource {
    /// Two tables, a view, a trigger, a routine and an event.
    pub fn with_rows(rows: u32) -> Self {
        let source = Self::empty();
        mariadb(
            &source.database,
            &format!(
                "create table item (id int primary key, text varchar(200)) engine=InnoDB;
                 insert into item select seq, concat(md5(seq), md5(seq * 7), md5(seq * 13)) from seq_1_to_{rows};
                 create table odd (id int primary key, t text, b blob, at datetime) engine=InnoDB character set utf8mb4;
                 insert into odd values (1, 'quote '' back\\\\ tab\\t 🦀', x'00ff', '2025-01-15 10:30:00'), (2, null, null, null);
                 create view cheap as select id from item where id < 10;
                 create procedure answer() select 42;
                 create trigger keep before delete on odd for each row set @gone = old.id;
                 create event tidy on schedule every 1 day do delete from odd where id > 1000"
            ),
        );
        source
    }

    /// A database without tables.
    pub fn empty() -> Self {
        let (database, user) = (unique("shop"), unique("reader"));
        let password = PASSWORD.replace('\\', "\\\\").replace('\'', "\\'");
        mariadb(
            "mysql",
            &format!(
                "create database {database}; create user {user}@'%' identified by '{password}'; grant all on {database}.* to {user}@'%'; grant select on mysql.proc to {user}@'%'"
            ),
        );
        Self { database, user }
    }

    /// As a source's config.
    pub fn config(&self) -> Value {
        json!({ "host": "127.0.0.1", "port": mariadb_port(), "username": self.user, "password": PASSWORD, "databases": [self.database] })
    }

    /// Restores a stored dump into an empty database by the public tools; gives its name.
    pub fn restore(&self, file: &Path) -> String {
        let target = unique("restored");
        mariadb("mysql", &format!("create database {target}"));
        shell(&format!(
            "zstd -dc '{}' | mariadb --no-defaults --protocol=TCP -h 127.0.0.1 -P {} -u root {target}",
            file.display(),
            mariadb_port()
        ));
        target
    }

    /// Demands that every table, view, trigger, routine and event of `other` is as ours.
    pub fn assert_same(&self, other: &str) {
        let digest = |database: &str| {
            let rows = mariadb(database, "checksum table item, odd extended").replace(database, "");
            let counts =
                "select count(*) from item; select count(*) from odd; select count(*) from cheap; call answer()";
            let names = "select trigger_name from information_schema.triggers where trigger_schema = database();
                         select event_name from information_schema.events where event_schema = database()";
            [rows, mariadb(database, counts), mariadb(database, names)].concat()
        };
        let (ours, theirs) = (digest(&self.database), digest(other));
        assert!(ours.contains("42") && ours.contains("tidy") && ours == theirs, "{ours}\n{theirs}");
    }
}

/// A job on a cluster without workers, which could not test its destination.
pub async fn job_without_workers(cluster: &Cluster, more: Value) -> String {
    let source = cluster.source("postgres", PostgresSource::empty().await.config()).await;
    let body = json!({ "name": "Store", "kind": "local", "config": { "root": cluster.scratch } });
    let destination = id(&cluster.ok("POST", "/api/destinations", Some(body)).await);
    cluster.job(&source, &[&destination], more).await
}
