//! `/executions/{id}/restore`: the form of a restore.

use axum::{Extension, extract::State, response::Response};
use common::{
    execution::restore,
    permission::Permission,
    source::{self, Engine},
};

use super::{
    Frame,
    form::{Choosable, Form, Input, InputType, Section},
    html,
};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::Segment,
    routes::{
        executions::find,
        restores::{Restorable, restorable},
    },
    state::AppState,
    ui::FormPage,
};

/// Where to, under which name, and whether what is there may go.
pub async fn make(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    frame: Frame,
) -> Result<Response, ApiError> {
    let backup = find(&state, &caller, &id).await?;
    let Restorable { databases, recipients } = restorable(&state, &backup).await?;
    let lists = frame.may(Permission::SourcesRead) && caller.only().is_none();
    let ask = async |conn: &mut sqlx::PgConnection| {
        let own = restore::own_source(conn, backup.id).await?;
        let all = if lists { source::list(conn, &source::Filter::default()).await?.rows } else { Vec::new() };
        Ok((own, all))
    };
    let (own, all) = state.ask(ask).await?;
    let engine = own.as_ref().map(|own| own.engine);
    let mut inputs = Vec::new();
    let targets: Vec<_> = all
        .iter()
        .filter(|source| engine.is_none_or(|engine| source.engine == engine))
        .map(|source| {
            let is_own = own.as_ref().is_some_and(|own| own.id == source.id);
            let label = if is_own { format!("{}, where it came from", source.name) } else { source.name.clone() };
            Choosable::new(source.id, label, is_own)
        })
        .collect();
    if !targets.is_empty() {
        inputs.push(Input::new(InputType::Choice, "sourceId", "Server of the source").options(targets));
    }
    if databases.len() > 1 {
        let mut options = vec![Choosable::new("", "All of them", true)];
        options.extend(databases.iter().map(|name| Choosable::new(name, name, false)));
        inputs.push(Input::new(InputType::Choice, "database", "Database of the backup").options(options));
    }
    inputs.push(
        Input::new(InputType::Text, "into", "Into the database")
            .placeholder(databases.first().map_or("", String::as_str))
            .help("Made where it is missing. Empty: its own name"),
    );
    inputs.push(
        Input::new(InputType::Switch, "overwrite", "Replace what is there")
            .help("Without this, a database that holds anything is refused and left as it is")
            .warning(
                "Replace what is there?",
                "Every table and every other object that the backup has is dropped there first, with all that was written since.",
                "Replace and restore",
            ),
    );
    if engine.is_none_or(|engine| engine == Engine::Postgres) {
        inputs.push(
            Input::new(InputType::Switch, "keepOwners", "Restore owners and grants")
                .help("Their roles must be there. Without this, everything belongs to the user of the source"),
        );
    }
    if !recipients.is_empty() {
        inputs.push(
            Input::new(InputType::Secret, "identity", "age identity").required().placeholder("AGE-SECRET-KEY-1…").help(
                format!(
                    "Opens the backup, which is encrypted to {}. It is forgotten when the restore has ended",
                    recipients.join(", ")
                ),
            ),
        );
    }
    let form = Form {
        api: format!("POST /api/executions/{}/restore", backup.id),
        then: "/executions/{executionId}".to_owned(),
        said: "The restore is queued.",
        changes: false,
        sections: vec![Section::new("", inputs)],
        submit: "Restore",
        cancel: format!("/executions/{}", backup.id).into(),
    };
    let lead = "The whole backup is read and its checksum compared before anything is touched.";
    html(&FormPage { frame, title: format!("Restore {}", backup.job_name), lead, form })
}
