//! `/jobs/{id}/trigger`: how a program triggers a job, with samples in which this server and this job are filled in.

use askama::Template;
use axum::{
    Extension,
    extract::State,
    http::{HeaderMap, header},
    response::Response,
};
use common::{job::Job, permission::Permission};

use super::{
    Frame, html,
    view::{asset, icon},
};
use crate::{
    auth::Caller,
    context::Visitor,
    error::ApiError,
    extract::Segment,
    routes::jobs::find,
    samples::{self, PLACEHOLDER_KEY, Sample},
    state::AppState,
};

#[derive(Template)]
#[template(path = "trigger.html")]
struct TriggerPage {
    frame: Frame,
    job: Job,
    server: String,
    samples: Vec<Sample>,
    key_body: String,
}

/// The page, which the table of jobs shows as a dialog.
pub async fn show(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Extension(visitor): Extension<Visitor>,
    Segment(id): Segment,
    headers: HeaderMap,
    frame: Frame,
) -> Result<Response, ApiError> {
    let job = find(&state, &caller, id).await?;
    // What the browser was told; the page's script knows better where a proxy hides it.
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost:3000");
    let server = format!("{}://{host}", if visitor.tls { "https" } else { "http" });
    let samples = samples::of(&server, PLACEHOLDER_KEY, &job.id.to_string());
    // Exactly what the samples need, and for this job alone.
    let name: String = format!("Trigger of {}", job.name).chars().take(200).collect();
    let key_body =
        serde_json::json!({ "name": name, "permissions": samples::PERMISSIONS, "jobIds": [job.id] }).to_string();
    html(&TriggerPage { frame, job, server, samples, key_body })
}

impl TriggerPage {
    /// Whether its reader may make the key: nobody grants what they do not hold.
    fn may_make_key(&self) -> bool {
        [Permission::ApiKeysWrite, Permission::JobsExecute, Permission::HistoryRead]
            .into_iter()
            .all(|p| self.frame.may(p))
    }
}
