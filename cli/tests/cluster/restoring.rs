//! Restores, and what they brought back.

use std::{net::IpAddr, sync::Mutex};

use serde_json::json;
use sqlx::{
    AssertSqlSafe, Connection, PgConnection,
    postgres::{PgConnectOptions, PgSslMode},
};

use crate::{harness::unique, project::Project};

/// A backup, and where it is restored.
pub struct Restores {
    backup: String,
    /// The server that they go to, and the source by which its workers reach it.
    server: IpAddr,
    source: String,
    /// Each execution, and the database that it fills.
    begun: Mutex<Vec<(String, String)>>,
}

impl Restores {
    /// Makes a backup of a job, to be restored into a source of the same server.
    pub async fn new(project: &Project, job: &str, source: String) -> Self {
        let backup = project.trigger(job).await;
        assert!(project.ended(&backup).await.is_success(), "a backup to restore");
        Self { backup, server: project.source, source, begun: Mutex::default() }
    }

    /// Orders a restore into a new database; gives the execution's id.
    pub async fn order(&self, project: &Project) -> String {
        let database = unique("restored");
        sqlx::raw_sql(AssertSqlSafe(format!("create database {database}")))
            .execute(&mut self.connect("postgres").await)
            .await
            .expect("makes a database");
        let path = format!("/api/executions/{}/restore", self.backup);
        let order = json!({ "into": database, "sourceId": self.source });
        let execution = project.accepted(project.ok("POST", &path, Some(order)).await);
        self.begun.lock().expect("not poisoned").push((execution.clone(), database));
        execution
    }

    async fn connect(&self, database: &str) -> PgConnection {
        let options = PgConnectOptions::new_without_pgpass().ssl_mode(PgSslMode::Disable);
        let options = options.host(&self.server.to_string()).username("postgres").password("source").database(database);
        PgConnection::connect_with(&options).await.expect("the source answers")
    }

    /// Which of them ended in a way that they may not, or brought back something else than all of the backup or nothing.
    pub async fn wrong(&self, project: &Project) -> Vec<String> {
        let whole = self.content("shop").await;
        let (mut wrong, begun) = (Vec::new(), self.begun.lock().expect("not poisoned").clone());
        for (execution, database) in &begun {
            let end = project.ended(execution).await;
            let content = self.content(database).await;
            let all_is_there = content == whole;
            let so_it_is = match () {
                () if end.is_success() || end.is_overtaken() => all_is_there,
                // One of the attempts that were lost may have committed.
                () => end.is_lost() && (all_is_there || content.is_none()),
            };
            if !so_it_is {
                wrong.push(format!("restore {execution} ended so: {end:?}, and {database} holds {content:?}"));
            }
        }
        println!("{} restores, {} of them all or nothing", begun.len(), begun.len() - wrong.len());
        wrong
    }

    /// How many rows there are, and their sum; `None` without the table.
    async fn content(&self, database: &str) -> Option<(i64, i64)> {
        let mut conn = self.connect(database).await;
        let exists = "select exists (select from pg_tables where tablename = 'item')";
        if !sqlx::query_scalar::<_, bool>(exists).fetch_one(&mut conn).await.expect("answers") {
            return None;
        }
        let content = "select count(*), sum(hashtext(id || text))::bigint from item";
        Some(sqlx::query_as(content).fetch_one(&mut conn).await.expect("answers"))
    }
}
