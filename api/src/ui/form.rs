//! Forms: every one of them is data for one template, and is sent by one script. The names of inputs are paths in the
//! body of the API's request, so that what the API says of a field stands beside it.

use askama::{Template, filters::HtmlSafe};
use common::{
    form::{Field, FieldType},
    label::Labels,
};
use serde_json::{Map, Value};

/// How an input looks, and what its text becomes in the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputType {
    /// Text; `null` when it is empty.
    Text,
    /// A whole number; `null` when it is empty.
    Number,
    /// What nobody may read over a shoulder.
    Secret,
    /// Text of some lines.
    Lines,
    /// A list, one on each line.
    List,
    /// An object, `name=value` on each line.
    Labels,
    /// One of the options.
    Choice,
    /// Yes, no or `null`.
    Boolean,
    /// Any of the options, as a list.
    Many,
    /// Yes or no.
    Switch,
    /// Sent as it is, and not shown.
    Fixed,
}

impl InputType {
    /// As the script reads it.
    pub fn name(&self) -> &'static str {
        match self {
            InputType::Text => "text",
            InputType::Number => "number",
            InputType::Secret => "secret",
            InputType::Lines => "lines",
            InputType::List => "list",
            InputType::Labels => "labels",
            InputType::Choice => "choice",
            InputType::Boolean => "boolean",
            InputType::Many => "many",
            InputType::Switch => "switch",
            InputType::Fixed => "fixed",
        }
    }
}

/// One of the options of an input.
#[derive(Clone, Debug)]
pub struct Choosable {
    /// As it is sent.
    pub value: String,
    /// For people.
    pub label: String,
    /// Whether it is chosen.
    pub chosen: bool,
    /// A title above it and those after it; empty for none.
    pub group: String,
}

impl Choosable {
    /// Without a group.
    pub fn new(value: impl ToString, label: impl ToString, chosen: bool) -> Self {
        Self { value: value.to_string(), label: label.to_string(), chosen, group: String::new() }
    }
}

/// One input with its label, help and error.
#[derive(Clone, Debug)]
pub struct Input {
    name: String,
    label: String,
    kind: InputType,
    value: String,
    options: Vec<Choosable>,
    required: bool,
    help: String,
    placeholder: String,
    autocomplete: &'static str,
    /// Where to make what could be chosen, when there is nothing: a path, and what is made there.
    make: Option<(&'static str, &'static str)>,
    warning: Option<Warning>,
}

/// What is asked before a switch that is on, or a number that was made smaller, is sent: title, text and the word for yes.
#[derive(Clone, Copy, Debug)]
struct Warning {
    title: &'static str,
    text: &'static str,
    yes: &'static str,
}

impl Input {
    /// An optional one.
    pub fn new(kind: InputType, name: &str, label: &str) -> Self {
        Self {
            name: name.to_owned(),
            label: label.to_owned(),
            kind,
            value: String::new(),
            options: Vec::new(),
            required: false,
            help: String::new(),
            placeholder: String::new(),
            autocomplete: "off",
            make: None,
            warning: None,
        }
    }

    /// A field of a config with what is stored in it.
    pub fn of_field(field: &Field, stored: Option<&Map<String, Value>>) -> Self {
        let (outer, inner) =
            field.name.split_once('.').map_or((field.name, None), |(outer, inner)| (outer, Some(inner)));
        let value = stored.and_then(|config| config.get(outer)).and_then(|value| match inner {
            Some(inner) => value.get(inner),
            None => Some(value),
        });
        let kind = match field.kind {
            FieldType::Text => InputType::Text,
            FieldType::Number => InputType::Number,
            FieldType::Secret => InputType::Secret,
            FieldType::Lines => InputType::Lines,
            FieldType::List => InputType::List,
            FieldType::Choice => InputType::Choice,
            FieldType::Boolean => InputType::Boolean,
        };
        let text = value.map(text_of).unwrap_or_default();
        let kept = kind == InputType::Secret && value.is_some();
        let options =
            field.options.iter().map(|option| Choosable::new(option.value, option.label, option.value == text));
        Self {
            options: options.collect(),
            required: field.required && !kept,
            help: field.help.to_owned(),
            placeholder: if kept { "stored; leave it empty to keep it" } else { field.placeholder }.to_owned(),
            value: if kind == InputType::Secret { String::new() } else { text },
            ..Self::new(kind, &format!("config.{}", field.name), field.label)
        }
    }

    /// Whose options are made elsewhere.
    pub fn make(self, make: Option<(&'static str, &'static str)>) -> Self {
        Self { make, ..self }
    }

    /// With this in it.
    pub fn value(self, value: impl ToString) -> Self {
        Self { value: value.to_string(), ..self }
    }

    /// That must be given.
    pub fn required(self) -> Self {
        Self { required: true, ..self }
    }

    /// With a sentence of help.
    pub fn help(self, help: impl ToString) -> Self {
        Self { help: help.to_string(), ..self }
    }

    /// With an example.
    pub fn placeholder(self, placeholder: impl ToString) -> Self {
        Self { placeholder: placeholder.to_string(), ..self }
    }

    /// With these to choose from.
    pub fn options(self, options: Vec<Choosable>) -> Self {
        Self { options, ..self }
    }

    /// That asks before it is sent, when it is on or was made smaller.
    pub fn warning(self, title: &'static str, text: &'static str, yes: &'static str) -> Self {
        Self { warning: Some(Warning { title, text, yes }), ..self }
    }

    /// As password managers know it.
    pub fn autocomplete(self, autocomplete: &'static str) -> Self {
        Self { autocomplete, ..self }
    }

    /// Its id in the page.
    fn id(&self) -> String {
        format!("in-{}", self.name.replace('.', "-"))
    }

    /// Ids of what describes it.
    fn described_by(&self) -> String {
        let id = self.id();
        if self.help.is_empty() { format!("{id}-error") } else { format!("{id}-help {id}-error") }
    }
}

fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(text_of).collect::<Vec<_>>().join("\n"),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// The input of labels.
pub fn labels(stored: Option<&Labels>) -> Input {
    let lines = stored.into_iter().flatten().map(|(name, value)| format!("{name}={value}"));
    Input::new(InputType::Labels, "labels", "Labels")
        .placeholder("env=prod")
        .help("name=value, one on each line")
        .value(lines.collect::<Vec<_>>().join("\n"))
}

/// Inputs that belong together.
#[derive(Clone, Debug)]
pub struct Section {
    legend: &'static str,
    folded: bool,
    inputs: Vec<Input>,
}

impl Section {
    /// Open; without a legend where that is empty.
    pub fn new(legend: &'static str, inputs: Vec<Input>) -> Self {
        Self { legend, folded: false, inputs }
    }

    /// Folded away until somebody wants it.
    pub fn folded(legend: &'static str, inputs: Vec<Input>) -> Self {
        Self { legend, folded: true, inputs }
    }
}

/// A form.
#[derive(Clone, Debug, Template)]
#[template(path = "form.html")]
pub struct Form {
    /// Method and path of the request.
    pub api: String,
    /// Where its reader goes after it; `{id}` and the like are of the answer.
    pub then: String,
    /// What they are told there.
    pub said: &'static str,
    /// Sends only what was changed.
    pub changes: bool,
    /// Its inputs.
    pub sections: Vec<Section>,
    /// The button.
    pub submit: &'static str,
    /// Where a change of mind leads; empty where nothing comes before.
    pub cancel: std::borrow::Cow<'static, str>,
}

impl HtmlSafe for Form {}

/// The sections of a config: what everybody fills in, and what few do.
pub fn of_config(fields: &[Field], stored: Option<&Map<String, Value>>) -> [Vec<Input>; 2] {
    let of = |advanced: bool| {
        fields.iter().filter(|field| field.advanced == advanced).map(|field| Input::of_field(field, stored)).collect()
    };
    [of(false), of(true)]
}
