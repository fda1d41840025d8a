//! What a form asks for: the fields of a source's or a destination's config, described once for every page and program
//! that draws one.

use serde::Serialize;

use crate::{destination::Kind, source::Engine};

/// How the value of a field is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FieldType {
    /// One line.
    Text,
    /// A whole number.
    Number,
    /// One line that is never shown again.
    Secret,
    /// Some lines, such as a certificate.
    Lines,
    /// A list of texts.
    List,
    /// One of `options`.
    Choice,
    /// Yes, no, or left to the service.
    Boolean,
}

/// One value of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Choice {
    /// As it is sent.
    pub value: &'static str,
    /// For people.
    pub label: &'static str,
}

/// One field of a config.
#[derive(Clone, Copy, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({ "name": "port", "label": "Port", "type": "number", "required": false, "help": "", "placeholder": "5432", "options": [], "advanced": false }))]
pub struct Field {
    /// Its path in `config`; a dot leads into an object, as in `tls.mode`.
    pub name: &'static str,
    /// For people.
    pub label: &'static str,
    /// How it is given.
    #[serde(rename = "type")]
    pub kind: FieldType,
    /// Nothing works without it.
    pub required: bool,
    /// One sentence, or nothing.
    pub help: &'static str,
    /// What counts when it is left out, or an example.
    pub placeholder: &'static str,
    /// Of a choice; the first counts when it is left out.
    pub options: &'static [Choice],
    /// Few need it: a form may fold it away.
    pub advanced: bool,
    /// It says where the thing is, to somebody who looks at a list of them.
    #[serde(skip)]
    pub place: bool,
}

impl Field {
    /// An optional line without help.
    pub const fn text(name: &'static str, label: &'static str) -> Self {
        Self {
            name,
            label,
            kind: FieldType::Text,
            required: false,
            help: "",
            placeholder: "",
            options: &[],
            advanced: false,
            place: false,
        }
    }

    /// Of another type.
    pub const fn of(self, kind: FieldType) -> Self {
        Self { kind, ..self }
    }

    /// That must be given.
    pub const fn required(self) -> Self {
        Self { required: true, ..self }
    }

    /// With a sentence of help.
    pub const fn help(self, help: &'static str) -> Self {
        Self { help, ..self }
    }

    /// With an example.
    pub const fn placeholder(self, placeholder: &'static str) -> Self {
        Self { placeholder, ..self }
    }

    /// That says where the thing is.
    pub const fn place(self) -> Self {
        Self { place: true, ..self }
    }

    /// Folded away.
    pub const fn advanced(self) -> Self {
        Self { advanced: true, ..self }
    }

    /// One of these.
    pub const fn choice(self, options: &'static [Choice]) -> Self {
        Self { kind: FieldType::Choice, options, ..self }
    }
}

/// What a source or a destination can be, with the fields of its config.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[schema(example = json!({ "id": "postgres", "label": "PostgreSQL", "fields": [] }))]
pub struct Form {
    /// As `engine` or `kind` takes it.
    pub id: &'static str,
    /// For people.
    pub label: &'static str,
    /// In the order of a form.
    pub fields: Vec<Field>,
}

const TLS_MODES: &[Choice] = &[
    Choice { value: "prefer", label: "When the server offers it" },
    Choice { value: "require", label: "Always, without a check of the certificate" },
    Choice { value: "verify-ca", label: "Always, with a certificate of the authority" },
    Choice { value: "verify-full", label: "Always, with a certificate for this host" },
    Choice { value: "disable", label: "Never" },
];

/// The form of a source of this engine.
pub fn of_engine(engine: Engine) -> Form {
    let (label, port, socket) = match engine {
        Engine::Postgres => ("PostgreSQL", "5432", "folder of a Unix socket on the workers, instead of a host"),
        Engine::Mysql => ("MySQL", "3306", "a Unix socket on the workers, instead of a host"),
        Engine::Mariadb => ("MariaDB", "3306", "a Unix socket on the workers, instead of a host"),
    };
    let fields = vec![
        Field::text("host", "Host").placeholder("db.example.com").help("as the workers reach it").place(),
        Field::text("port", "Port").of(FieldType::Number).placeholder(port),
        Field::text("username", "User").required().placeholder("backup").help("must be able to read what is backed up"),
        Field::text("password", "Password").of(FieldType::Secret),
        Field::text("databases", "Databases")
            .of(FieldType::List)
            .required()
            .placeholder("shop")
            .help("one on each line"),
        Field::text("tls.mode", "TLS").choice(TLS_MODES),
        Field::text("tls.caCertificate", "CA certificate")
            .of(FieldType::Lines)
            .placeholder("-----BEGIN CERTIFICATE-----")
            .help("PEM of the authority that signed the server's certificate")
            .advanced(),
        Field::text("socket", "Socket").help(socket).advanced().place(),
    ];
    Form { id: engine.as_str(), label, fields }
}

/// The form of a destination of this kind.
pub fn of_kind(kind: Kind) -> Form {
    let (label, fields) = match kind {
        Kind::Local => (
            "Folder",
            vec![
                Field::text("root", "Folder")
                    .required()
                    .placeholder("/var/backups/dbackup")
                    .help("on every worker, under one of its DBACKUP_LOCAL_PATHS")
                    .place(),
            ],
        ),
        Kind::S3 => (
            "S3",
            vec![
                Field::text("bucket", "Bucket").required().help("it must exist").place(),
                Field::text("region", "Region").placeholder("us-east-1"),
                Field::text("accessKeyId", "Access key").required(),
                Field::text("secretAccessKey", "Secret access key").of(FieldType::Secret).required(),
                Field::text("endpoint", "Endpoint")
                    .placeholder("https://s3.example.com")
                    .help("URL of another service than AWS that speaks S3")
                    .place(),
                Field::text("prefix", "Prefix").placeholder("backups").help("put in front of every name").advanced(),
                Field::text("pathStyle", "Path style")
                    .of(FieldType::Boolean)
                    .help(
                        "endpoint/bucket/key instead of bucket.endpoint/key; left out, yes where there is an endpoint",
                    )
                    .advanced(),
            ],
        ),
    };
    Form { id: kind.as_str(), label, fields }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::{
        connection::{Shape, SplitConfig},
        destination, source,
    };

    /// A config with a value in every field of a form but one.
    fn filled(form: &Form, shape: Shape, without: &str) -> SplitConfig {
        let mut sent = Map::new();
        for field in form.fields.iter().filter(|field| field.name != without) {
            let value = match field.kind {
                FieldType::Number => json!(5432),
                FieldType::List => json!(["shop"]),
                FieldType::Choice => json!(field.options[0].value),
                FieldType::Boolean => json!(true),
                _ if field.name == "endpoint" => json!("https://s3.example.com"),
                _ if ["socket", "root"].contains(&field.name) => json!("/somewhere"),
                _ => json!("x"),
            };
            match field.name.split_once('.') {
                Some((outer, inner)) => sent.entry(outer).or_insert_with(|| json!({}))[inner] = value,
                None => {
                    sent.insert(field.name.to_owned(), value);
                }
            }
        }
        shape.merge(SplitConfig::default(), sent).expect("merges")
    }

    fn secrets(form: &Form) -> Vec<&str> {
        form.fields.iter().filter(|field| field.kind == FieldType::Secret).map(|field| field.name).collect()
    }

    /// Whether nothing works without a field, as the form says.
    fn required(form: &Form) -> impl Iterator<Item = &'static str> {
        form.fields.iter().filter(|field| field.required).map(|field| field.name)
    }

    #[test]
    fn every_engine_has_a_form_of_the_fields_that_its_config_takes() {
        for engine in Engine::ALL {
            let (form, shape) = (of_engine(engine), source::SHAPE);
            // They exclude each other.
            for without in ["host", "socket"] {
                assert_eq!(source::config_problems(&filled(&form, shape, without)), [], "{engine:?} without {without}");
            }
            assert_eq!(secrets(&form), shape.secrets, "{engine:?}");
            for name in required(&form) {
                let mut config = filled(&form, shape, "socket");
                config.open.insert(name.to_owned(), Value::Null);
                assert_ne!(source::config_problems(&config), [], "{engine:?} without {name}");
            }
        }
    }

    #[test]
    fn every_kind_of_store_has_a_form_of_the_fields_that_its_config_takes() {
        for kind in Kind::ALL {
            let (form, shape) = (of_kind(kind), kind.shape());
            assert_eq!(destination::config_problems(kind, &filled(&form, shape, "")), [], "{kind:?}");
            assert_eq!(secrets(&form), shape.secrets, "{kind:?}");
            for name in required(&form) {
                assert_ne!(
                    destination::config_problems(kind, &filled(&form, shape, name)),
                    [],
                    "{kind:?} without {name}"
                );
            }
        }
    }
}
