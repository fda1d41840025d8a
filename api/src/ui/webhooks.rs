//! `/settings/webhooks`: who is told of the ends of runs.

use askama::Template;
use axum::{extract::State, response::Response};
use common::{
    permission::Permission,
    webhook::{self, Webhook, WebhookEvent},
};

use super::{
    FormPage, Frame,
    form::{Choosable, Form, Input, InputType, Section, labels},
    html,
    view::{asset, icon, when_or_dash},
};
use crate::{error::ApiError, extract::Segment, routes::webhooks::find, state::AppState};

#[derive(Template)]
#[template(path = "webhooks.html")]
struct WebhooksPage {
    frame: Frame,
    webhooks: Vec<Webhook>,
}

impl WebhooksPage {
    fn events(&self, webhook: &Webhook) -> String {
        webhook.events.iter().map(|event| event.as_str()).collect::<Vec<_>>().join(", ")
    }

    fn labels(&self, webhook: &Webhook) -> String {
        let labels = webhook.labels.iter().map(|(name, value)| format!("{name}={value}"));
        labels.collect::<Vec<_>>().join(", ")
    }

    /// Whether it did not take the last that it was told.
    fn fails(&self, webhook: &Webhook) -> bool {
        webhook.last_failed_at > webhook.last_delivered_at
    }
}

/// The table of webhooks.
pub async fn list(State(state): State<AppState>, frame: Frame) -> Result<Response, ApiError> {
    let webhooks = state.ask(async |conn| webhook::list(conn, &webhook::Filter::default()).await).await?.rows;
    html(&WebhooksPage { frame, webhooks })
}

fn form(webhook: Option<&Webhook>) -> Form {
    let url = Input::new(InputType::Secret, "url", "Address");
    let url = match webhook {
        Some(webhook) => url.placeholder(&webhook.url).help("stored sealed; leave it empty to keep it"),
        None => url
            .required()
            .placeholder("https://hooks.example.com/backups")
            .help("it is told by POST, and stored sealed"),
    };
    let told = |event: WebhookEvent| webhook.map_or(event == WebhookEvent::Failed, |w| w.events.contains(&event));
    let events = WebhookEvent::ALL.map(|event| {
        let label = match event {
            WebhookEvent::Failed => "A run failed",
            WebhookEvent::Cancelled => "A run was cancelled",
            WebhookEvent::Succeeded => "A run succeeded",
        };
        Choosable::new(event.as_str(), label, told(event))
    });
    Form {
        api: webhook.map_or("POST /api/webhooks".to_owned(), |webhook| format!("PUT /api/webhooks/{}", webhook.id)),
        then: if webhook.is_some() { "/settings/webhooks" } else { "show-secret" }.to_owned(),
        said: if webhook.is_some() { "The webhook is saved." } else { "" },
        changes: webhook.is_some(),
        sections: vec![Section::new(
            "",
            vec![
                Input::new(InputType::Text, "name", "Name")
                    .required()
                    .placeholder("On call")
                    .value(webhook.map_or("", |webhook| webhook.name.as_str())),
                url,
                Input::new(InputType::Many, "events", "It is told when").options(events.into()),
                labels(webhook.map(|webhook| &webhook.labels))
                    .help("only of runs with these labels; name=value, one on each line"),
            ],
        )],
        submit: if webhook.is_some() { "Save" } else { "Make the webhook" },
        cancel: "/settings/webhooks".into(),
    }
}

/// The form of a new webhook.
pub async fn make(frame: Frame) -> Result<Response, ApiError> {
    let lead = "It is told of the end of every run that fits. The secret that signs what it is told is shown once, when it is made.";
    html(&FormPage { frame, title: "New webhook".to_owned(), lead, form: form(None) })
}

/// The form of a webhook that exists.
pub async fn edit(State(state): State<AppState>, Segment(id): Segment, frame: Frame) -> Result<Response, ApiError> {
    let webhook = find(&state, &id).await?;
    let form = form(Some(&webhook));
    html(&FormPage { frame, title: format!("Edit {}", webhook.name), lead: "", form })
}
