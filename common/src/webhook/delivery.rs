//! What webhooks have not taken yet: taken by one worker for the time of a try, and recorded after it.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use crate::{
    id::{ExecutionId, WebhookId},
    telemetry::TraceContext,
};

/// Something to be told, for the moment to this process alone.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The same for every try.
    pub id: uuid::Uuid,
    /// Whom to tell.
    pub webhook_id: WebhookId,
    /// Its name.
    pub webhook_name: String,
    /// Its sealed address.
    pub sealed: Vec<u8>,
    /// Of which run; `None` for a test.
    pub execution_id: Option<ExecutionId>,
    /// A [`super::WebhookEvent`], or `test`.
    pub event: String,
    /// Which try this is.
    pub attempt: i32,
    /// When the run ended.
    pub created_at: DateTime<Utc>,
    /// Trace of the run.
    pub traceparent: Option<String>,
    /// See [`Delivery::traceparent`].
    pub tracestate: Option<String>,
}

impl Delivery {
    /// The trace of the run; none of a test.
    pub fn trace(&self) -> TraceContext {
        TraceContext { traceparent: self.traceparent.clone(), tracestate: self.tracestate.clone() }
    }
}

/// Takes what is due, but of those that are `busy`, and at most so much of each. Nobody else takes it within `hold`, which
/// is longer than a try.
pub async fn take_due(
    conn: &mut PgConnection,
    busy: &[WebhookId],
    most: i64,
    hold: Duration,
) -> Result<Vec<Delivery>, sqlx::Error> {
    sqlx::query_as!(
        Delivery,
        r#"with due as materialized (
               select d.id
                 from webhooks w
                cross join lateral (select id from webhook_deliveries d
                                     where d.webhook_id = w.id and d.due_at <= now()
                                     order by d.due_at limit $1 for update skip locked) d
                where w.id <> all ($3)
           )
           update webhook_deliveries d
              set attempts = d.attempts + 1, due_at = clock_timestamp() + $2 * interval '1 millisecond'
             from due, webhooks w
            where d.id = due.id and w.id = d.webhook_id
           returning d.id as "id!", d.webhook_id as "webhook_id!: WebhookId", w.name as "webhook_name!", w.sealed as "sealed!",
                     d.execution_id as "execution_id: ExecutionId", d.event as "event!", d.attempts as "attempt!",
                     d.created_at as "created_at!",
                     (select e.traceparent from executions e where e.id = d.execution_id) as traceparent,
                     (select e.tracestate from executions e where e.id = d.execution_id) as tracestate"#,
        most,
        millis(hold),
        busy as _,
    )
    .fetch_all(conn)
    .await
}

#[allow(clippy::cast_precision_loss, reason = "milliseconds of a pause")]
fn millis(duration: Duration) -> f64 {
    duration.as_millis() as f64
}

/// It was taken. A test stays for whoever asked for it.
pub async fn delivered(conn: &mut PgConnection, delivery: &Delivery) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "with taken as (
             update webhooks set last_delivered_at = clock_timestamp() where id = $2
         ), tested as (
             update webhook_deliveries set due_at = 'infinity', error = null where id = $1 and event = 'test'
         )
         delete from webhook_deliveries where id = $1 and event <> 'test'",
        delivery.id,
        delivery.webhook_id as _,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// How long something is tried to be told.
const PATIENCE_HOURS: f64 = 24.0;

/// It was not taken, and is tried again after `pause`; gives whether that was the last try.
pub async fn failed(
    conn: &mut PgConnection,
    delivery: &Delivery,
    error: &str,
    pause: Duration,
) -> Result<bool, sqlx::Error> {
    let gone = sqlx::query_scalar!(
        r#"with told as (
               update webhooks set last_failed_at = clock_timestamp(), last_error = $3 where id = $2
           ), gone as (
               delete from webhook_deliveries
                where id = $1 and event <> 'test' and created_at < now() - $5 * interval '1 hour'
               returning id
           ), again as (
               update webhook_deliveries
                  set error = $3, due_at = case event when 'test' then 'infinity' else clock_timestamp() + $4 * interval '1 millisecond' end
                where id = $1 and (event = 'test' or created_at >= now() - $5 * interval '1 hour')
           )
           select exists (select 1 from gone) as "gone!""#,
        delivery.id,
        delivery.webhook_id as _,
        error,
        millis(pause),
        PATIENCE_HOURS,
    )
    .fetch_one(conn)
    .await?;
    Ok(gone)
}

/// Asks for a test; `None` when the webhook is gone.
pub async fn ask_test(conn: &mut PgConnection, id: WebhookId) -> Result<Option<uuid::Uuid>, sqlx::Error> {
    sqlx::query_scalar!(
        "insert into webhook_deliveries (id, webhook_id, event) select $2, id, 'test' from webhooks where id = $1 returning id",
        id as _,
        uuid::Uuid::now_v7(),
    )
    .fetch_optional(conn)
    .await
}

/// What became of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tested {
    /// Nobody has tried yet, or somebody does now.
    Waiting,
    /// It was taken, or was not.
    Done(Result<(), String>),
}

/// Looks at a test.
pub async fn tested(conn: &mut PgConnection, test: uuid::Uuid) -> Result<Tested, sqlx::Error> {
    let row =
        sqlx::query!(r#"select due_at = 'infinity' as "done!", error from webhook_deliveries where id = $1"#, test)
            .fetch_optional(conn)
            .await?;
    Ok(match row {
        Some(row) if row.done => Tested::Done(row.error.map_or(Ok(()), Err)),
        Some(_) => Tested::Waiting,
        None => Tested::Done(Err("the webhook was deleted meanwhile".to_owned())),
    })
}

/// Takes a test back, done or not.
pub async fn withdraw(conn: &mut PgConnection, test: uuid::Uuid) -> Result<(), sqlx::Error> {
    sqlx::query!("delete from webhook_deliveries where id = $1", test).execute(conn).await?;
    Ok(())
}

/// Removes tests that nobody waits for any more.
pub async fn forget_tests(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "delete from webhook_deliveries where execution_id is null and created_at < now() - interval '1 hour'"
    )
    .execute(conn)
    .await?;
    Ok(())
}
