//! `/sources` and `/destinations`: the same pages for both, with forms drawn from what the engines and kinds say of
//! themselves, so that a new one needs no page.

use askama::Template;
use axum::{Extension, extract::State, response::Response};
use common::{
    destination::{self, Destination, Kind},
    form::{self, Field, Form as Described},
    job::Job,
    permission::Permission,
    source::{self, Engine, Source},
};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Frame,
    form::{Form, Input, InputType, Section, labels, of_config},
    html, jobs,
    view::{asset, icon, when},
};
use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Query, Segment},
    routes::{destinations, sources},
    state::AppState,
};

/// What tells the two apart.
#[derive(Clone, Copy)]
struct Noun {
    path: &'static str,
    one: &'static str,
    many: &'static str,
    icon: &'static str,
    /// The field of the body that says what it is.
    what: &'static str,
    write: Permission,
    is: &'static str,
    /// What its test does.
    test: &'static str,
}

const SOURCE: Noun = Noun {
    path: "/sources",
    one: "source",
    many: "Sources",
    icon: "source",
    what: "engine",
    write: Permission::SourcesWrite,
    is: "A source is a database server, and the databases on it that are backed up together.",
    test: "A worker signs in and looks at every database.",
};
const DESTINATION: Noun = Noun {
    path: "/destinations",
    one: "destination",
    many: "Destinations",
    icon: "destination",
    what: "kind",
    write: Permission::DestinationsWrite,
    is: "A destination is a store that backups are written to: a folder that the workers have, or an object store.",
    test: "A worker writes to it. A folder gets its marker file by this, without which no backup is written.",
};

/// A source or a destination.
struct Connection {
    id: String,
    name: String,
    slug: String,
    what: Described,
    config: Map<String, Value>,
    pool: String,
    /// Needs a test before it can be used.
    untested: bool,
    made: chrono::DateTime<chrono::Utc>,
    common: Vec<Input>,
}

fn pool(value: &str) -> Input {
    Input::new(InputType::Text, "pool", "Pool").placeholder("default").help("whose workers reach it").value(value)
}

/// The limits of a source: of its backups, and of the restores into it.
fn limits(runs: Option<i32>, restores: Option<i32>) -> [Input; 2] {
    [("maxConcurrentRuns", "Backups at once", runs), ("maxConcurrentRestores", "Restores at once", restores)].map(
        |(name, label, value)| {
            let input = Input::new(InputType::Number, name, label).placeholder("no limit of its own");
            input.value(value.map(|n| n.to_string()).unwrap_or_default())
        },
    )
}

impl From<Source> for Connection {
    fn from(source: Source) -> Self {
        let [runs, restores] = limits(source.max_concurrent_runs, source.max_concurrent_restores);
        let common = vec![pool(&source.pool), runs, restores, labels(Some(&source.labels))];
        Self {
            id: source.id.to_string(),
            name: source.name,
            slug: source.slug,
            what: form::of_engine(source.engine),
            config: source.config,
            pool: source.pool,
            untested: false,
            made: source.created_at,
            common,
        }
    }
}

impl From<Destination> for Connection {
    fn from(destination: Destination) -> Self {
        let common = vec![pool(&destination.pool), labels(Some(&destination.labels))];
        Self {
            id: destination.id.to_string(),
            name: destination.name,
            slug: destination.slug,
            what: form::of_kind(destination.kind),
            config: destination.config,
            pool: destination.pool,
            untested: destination.ready_at.is_none(),
            made: destination.created_at,
            common,
        }
    }
}

impl Connection {
    /// Where it is, in a word.
    fn place(&self) -> String {
        self.stored().filter(|(field, _)| field.place).map(|(_, value)| value).collect::<Vec<_>>().join(" ")
    }

    /// The fields of its form that are set, with what is stored in each.
    fn stored(&self) -> impl Iterator<Item = (&Field, String)> {
        self.what.fields.iter().filter_map(|field| {
            let mut names = field.name.split('.');
            let outer = self.config.get(names.next()?)?;
            Some((field, shown(names.try_fold(outer, |value, name| value.get(name))?)))
        })
    }

    /// What is stored of it, for people.
    fn facts(&self) -> Vec<(&'static str, String)> {
        let fields = self.stored().map(|(field, value)| (field.label, value));
        fields.chain([("Pool", self.pool.clone()), ("Slug", self.slug.clone())]).collect()
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[derive(Template)]
#[template(path = "connections.html")]
struct ListPage {
    frame: Frame,
    noun: Noun,
    rows: Vec<Connection>,
}

impl ListPage {
    fn may_write(&self) -> bool {
        self.frame.may(self.noun.write)
    }
}

/// The table of sources.
pub async fn sources(State(state): State<AppState>, frame: Frame) -> Result<Response, ApiError> {
    let found = state.ask(async |conn| source::list(conn, &source::Filter::default()).await).await?;
    html(&ListPage { frame, noun: SOURCE, rows: found.rows.into_iter().map(Connection::from).collect() })
}

/// The table of destinations.
pub async fn destinations(State(state): State<AppState>, frame: Frame) -> Result<Response, ApiError> {
    let found = state.ask(async |conn| destination::list(conn, &destination::Filter::default()).await).await?;
    html(&ListPage { frame, noun: DESTINATION, rows: found.rows.into_iter().map(Connection::from).collect() })
}

#[derive(Template)]
#[template(path = "connection.html")]
struct OnePage {
    frame: Frame,
    noun: Noun,
    it: Connection,
    jobs: Vec<Job>,
    next: Option<(&'static str, &'static str)>,
}

impl OnePage {
    fn may_write(&self) -> bool {
        self.frame.may(self.noun.write)
    }
}

/// One source.
pub async fn source(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    frame: Frame,
) -> Result<Response, ApiError> {
    let found = sources::find(&state, id).await?;
    let mut jobs = jobs(&state, &caller).await?;
    jobs.retain(|job| job.source_id == found.id);
    let stores = state
        .ask(async |conn| destination::list(conn, &destination::Filter { limit: Some(1), ..Default::default() }).await);
    let next = match stores.await?.rows.is_empty() {
        true if frame.may(Permission::DestinationsWrite) => Some(("/destinations/new", "Add a destination")),
        false if jobs.is_empty() && frame.may(Permission::JobsWrite) => Some(("/jobs/new", "Make a job")),
        _ => None,
    };
    html(&OnePage { frame, noun: SOURCE, it: found.into(), jobs, next })
}

/// One destination.
pub async fn destination(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    frame: Frame,
) -> Result<Response, ApiError> {
    let found = destinations::find(&state, id).await?;
    let mut jobs = jobs(&state, &caller).await?;
    jobs.retain(|job| job.destination_ids.contains(&found.id));
    let next = (jobs.is_empty() && frame.may(Permission::JobsWrite)).then_some(("/jobs/new", "Make a job"));
    html(&OnePage { frame, noun: DESTINATION, it: found.into(), jobs, next })
}

#[derive(Template)]
#[template(path = "connection_form.html")]
struct FormPage {
    frame: Frame,
    noun: Noun,
    title: String,
    /// What it may be; empty where that is settled.
    choices: Vec<Described>,
    chosen: &'static str,
    form: Form,
}

impl FormPage {
    fn is_chosen(&self, choice: &Described) -> bool {
        choice.id == self.chosen
    }
}

/// What a new one is to be.
#[derive(Deserialize)]
pub struct WhatQuery {
    #[serde(default)]
    what: String,
}

fn new_page(frame: Frame, noun: Noun, choices: Vec<Described>, query: &WhatQuery, common: Vec<Input>) -> FormPage {
    let chosen = choices.iter().find(|choice| choice.id == query.what).unwrap_or(&choices[0]).clone();
    let [plain, mut advanced] = of_config(&chosen.fields, None);
    advanced.extend(common);
    let mut first = vec![
        Input::new(InputType::Text, "name", "Name").required(),
        Input::new(InputType::Fixed, noun.what, "").value(chosen.id),
    ];
    first.extend(plain);
    let form = Form {
        api: format!("POST /api{}", noun.path),
        then: format!("{}/{{id}}#test", noun.path),
        said: "",
        changes: false,
        sections: vec![Section::new("", first), Section::folded("More", advanced)],
        submit: "Save and test",
        cancel: noun.path.into(),
    };
    FormPage { frame, noun, title: format!("New {}", noun.one), chosen: chosen.id, choices, form }
}

/// The form of a new source.
pub async fn make_source(Query(query): Query<WhatQuery>, frame: Frame) -> Result<Response, ApiError> {
    let [runs, restores] = limits(None, None);
    let common = vec![pool(""), runs, restores, labels(None)];
    html(&new_page(frame, SOURCE, Engine::ALL.map(form::of_engine).into(), &query, common))
}

/// The form of a new destination.
pub async fn make_destination(Query(query): Query<WhatQuery>, frame: Frame) -> Result<Response, ApiError> {
    html(&new_page(frame, DESTINATION, Kind::ALL.map(form::of_kind).into(), &query, vec![pool(""), labels(None)]))
}

fn edit_page(frame: Frame, noun: Noun, it: Connection, cancel: &'static str) -> FormPage {
    let [mut plain, mut advanced] = of_config(&it.what.fields, Some(&it.config));
    plain.insert(0, Input::new(InputType::Text, "name", "Name").required().value(&it.name));
    advanced.extend(it.common);
    let form = Form {
        api: format!("PUT /api{}/{}", noun.path, it.id),
        then: format!("{}/{}#test", noun.path, it.id),
        said: "",
        changes: true,
        sections: vec![Section::new("", plain), Section::folded("More", advanced)],
        submit: "Save and test",
        cancel: cancel.into(),
    };
    FormPage { frame, noun, title: format!("Edit {}", it.name), choices: Vec::new(), chosen: it.what.id, form }
}

/// The form of a source that exists.
pub async fn edit_source(
    State(state): State<AppState>,
    Segment(id): Segment,
    frame: Frame,
) -> Result<Response, ApiError> {
    let found = sources::find(&state, id).await?;
    html(&edit_page(frame, SOURCE, found.into(), "/sources"))
}

/// The form of a destination that exists.
pub async fn edit_destination(
    State(state): State<AppState>,
    Segment(id): Segment,
    frame: Frame,
) -> Result<Response, ApiError> {
    let found = destinations::find(&state, id).await?;
    html(&edit_page(frame, DESTINATION, found.into(), "/destinations"))
}
