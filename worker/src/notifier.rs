//! The notifier: tells webhooks of the ends of runs, which the database has noted. Every worker does it; what one has taken
//! nobody else takes meanwhile. Told at least once: a worker that dies between an answer and its record lets another tell
//! it again, with the same `webhook-id`.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use common::{
    db::{ANSWER_TIMEOUT, DbError},
    error::Chain,
    execution::{self, Execution},
    id::WebhookId,
    metrics,
    queue::{Notice, heard},
    telemetry::{
        Span, TraceContext,
        span::{self, SpanKind},
    },
    webhook::{
        Address,
        delivery::{self, Delivery},
    },
};
use futures::future::join_all;
use reqwest::{Client, redirect::Policy};
use secrecy::ExposeSecret;
use serde_json::json;
use sqlx::PgConnection;
use tokio::{sync::broadcast::Receiver, task::JoinSet};

use crate::{back_off::back_off, service::Shared};

/// Longest time of one try.
const TRY: Duration = Duration::from_secs(10);
/// How long a delivery is one worker's: a try and the record of it.
const HOLD: Duration = Duration::from_secs(30);
/// Deliveries that a webhook is told at once by one worker.
const AT_ONCE: i64 = 4;
/// Shortest time between two looks: runs end by the hundred in a second, and who is told can wait that long.
const GATHER: Duration = Duration::from_millis(200);
/// Longest pause between two tries.
const MOST_PAUSE: Duration = Duration::from_secs(3_600);

/// Tells for ever.
pub async fn run(shared: Shared) {
    // No redirect is followed: a signed message goes where its owner wanted it, and nowhere else.
    let client = Client::builder().timeout(TRY).redirect(Policy::none()).user_agent("dbackup").build();
    let client = match client {
        Ok(client) => client,
        Err(error) => {
            tracing::error!(error = %Chain(&error), "webhooks are not told: there is no HTTP client");
            return;
        }
    };
    let mut notices = shared.wakeups.subscribe();
    // One that does not answer keeps nobody else waiting: each has a task of its own.
    let (mut busy, mut telling) = (Vec::new(), JoinSet::new());
    loop {
        match take_due(&shared, &busy).await {
            Ok(due) => {
                for (webhook, deliveries) in due {
                    busy.push(webhook);
                    telling.spawn(tell_all(shared.clone(), client.clone(), webhook, deliveries));
                }
            }
            Err(error) => tracing::debug!(error = %Chain(&error), "webhooks are told later"),
        }
        tokio::select! {
            Some(told) = telling.join_next() => match told {
                Ok(webhook) => busy.retain(|other| *other != webhook),
                Err(error) => {
                    tracing::error!(%error, "a bug in the worker: a webhook was not told; it is tried again");
                    busy.clear();
                }
            },
            () = something_to_tell(&shared, &mut notices) => {}
        }
    }
}

/// Waits until a run may have ended, or for a tick.
async fn something_to_tell(shared: &Shared, notices: &mut Receiver<Notice>) {
    let tick = shared.config.timing.ticker.mul_f64(rand::random_range(0.75..1.25));
    heard(notices, tick, |notice| matches!(notice, Notice::Changed(_) | Notice::Test)).await;
    tokio::time::sleep(GATHER).await;
}

/// Takes what is due of those that are not busy.
async fn take_due(shared: &Shared, busy: &[WebhookId]) -> Result<BTreeMap<WebhookId, Vec<Delivery>>, DbError> {
    let take = async |conn: &mut PgConnection| delivery::take_due(conn, busy, AT_ONCE, HOLD).await;
    let mut due: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for delivery in shared.db.within(ANSWER_TIMEOUT, take).await? {
        due.entry(delivery.webhook_id).or_default().push(delivery);
    }
    Ok(due)
}

/// Tells one webhook what was taken for it.
async fn tell_all(shared: Shared, client: Client, webhook: WebhookId, deliveries: Vec<Delivery>) -> WebhookId {
    join_all(deliveries.iter().map(|delivery| tell(&shared, &client, delivery))).await;
    if deliveries.iter().any(|delivery| delivery.execution_id.is_none()) {
        shared.wakeups.tell(Notice::Test);
    }
    webhook
}

/// Tells one, and records what became of it. Where that fails, it is due again when its hold is over.
async fn tell(shared: &Shared, client: &Client, delivery: &Delivery) {
    let recorded = match try_once(shared, client, delivery).await {
        Ok(()) => {
            metrics::get().delivery("delivered");
            shared.db.within(ANSWER_TIMEOUT, async |conn| delivery::delivered(conn, delivery).await).await
        }
        Err(error) => failed(shared, delivery, &error).await,
    };
    if let Err(error) = recorded {
        tracing::debug!(webhook = %delivery.webhook_id, error = %Chain(&error), "a delivery could not be recorded; it is tried again");
    }
}

async fn failed(shared: &Shared, delivery: &Delivery, error: &str) -> Result<(), DbError> {
    let pause = back_off(shared.config.timing.ticker, delivery.attempt, MOST_PAUSE);
    let gone =
        shared.db.within(ANSWER_TIMEOUT, async |conn| delivery::failed(conn, delivery, error, pause).await).await?;
    metrics::get().delivery(if gone { "given_up" } else { "failed" });
    let Delivery { webhook_id, webhook_name, event, attempt, .. } = delivery;
    let execution = delivery.execution_id.map(|id| id.to_string());
    if gone {
        tracing::error!(webhook = %webhook_id, name = webhook_name, event, execution, attempt, error, "a webhook was not told within a day of the end of a run: given up");
    } else {
        tracing::warn!(webhook = %webhook_id, name = webhook_name, event, execution, attempt, error, "a webhook could not be told");
    }
    Ok(())
}

async fn try_once(shared: &Shared, client: &Client, delivery: &Delivery) -> Result<(), String> {
    let address = Address::open(&shared.key, delivery.webhook_id, &delivery.sealed)
        .map_err(|error| format!("its stored address: {error}"))?;
    let execution = match delivery.execution_id {
        Some(id) => {
            let found = shared.db.within(ANSWER_TIMEOUT, async |conn| execution::find(conn, id).await).await;
            found.map_err(|error| format!("the run could not be read: {}", Chain(&error)))?
        }
        None => None,
    };
    let mut span = Span::child(&delivery.trace().span(), SpanKind::Client, "notify");
    span.set("http.request.method", "POST");
    if let Some((host, port)) = address.server() {
        span.set("server.address", host);
        span.set("server.port", i64::from(port));
    }
    span.set("dbackup.webhook", delivery.webhook_name.clone());
    span.set("dbackup.event", delivery.event.clone());
    span.set("http.request.resend_count", i64::from(delivery.attempt - 1));
    let sent = send(client, &address, delivery, execution.as_ref(), &mut span).await;
    if let Err(error) = &sent {
        span.fail("notify_failed", error.clone());
    }
    sent
}

async fn send(
    client: &Client,
    address: &Address,
    delivery: &Delivery,
    execution: Option<&Execution>,
    span: &mut Span,
) -> Result<(), String> {
    let kind = match execution {
        Some(_) => format!("execution.{}", delivery.event),
        None => delivery.event.clone(),
    };
    let at = delivery.created_at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    let body = json!({ "type": kind, "timestamp": at, "data": execution }).to_string();
    let now = span::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let timestamp = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let mut request = client
        .post(address.url.expose_secret())
        .header("content-type", "application/json")
        .header("webhook-id", delivery.id.to_string())
        .header("webhook-timestamp", timestamp)
        .header("webhook-signature", address.sign(delivery.id, timestamp, &body));
    let context = TraceContext::of(span.context());
    for (name, value) in [("traceparent", context.traceparent), ("tracestate", context.tracestate)] {
        if let Some(value) = value {
            request = request.header(name, value);
        }
    }
    // The address may be a secret: an error must not name it.
    let response = request.body(body).send().await.map_err(|error| Chain(&error.without_url()).to_string())?;
    let status = response.status();
    span.set("http.response.status_code", i64::from(status.as_u16()));
    match status {
        status if status.is_success() => Ok(()),
        status if status.is_redirection() => {
            Err(format!("it answers {status}, a redirect, which is not followed: give the address that it leads to"))
        }
        status => Err(format!("it answers {status}")),
    }
}
