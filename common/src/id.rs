//! Identifiers: a type of its own for each noun, so that a job's id is never taken for an execution's.

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize, sqlx::Type, utoipa::ToSchema)]
        #[schema(value_type = String)]
        #[serde(transparent)]
        #[sqlx(transparent)]
        pub struct $name(pub uuid::Uuid);

        impl $name {
            /// A new id: UUIDv7, so that new rows land at the end of an index.
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self {
                Self(uuid::Uuid::now_v7())
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                uuid::Uuid::parse_str(text).map(Self)
            }
        }
    };
}

id!(
    /// A stored definition of a backup.
    JobId
);
id!(
    /// One run of a job.
    ExecutionId
);
id!(
    /// A database server that is backed up.
    SourceId
);
id!(
    /// A store that backups are written to.
    DestinationId
);
id!(
    /// A caller's key.
    ApiKeyId
);

id!(
    /// Somebody who is told of the ends of runs.
    WebhookId
);

id!(
    /// A worker of a process, from its start to its end.
    WorkerId
);

id!(
    /// A person.
    UserId
);
id!(
    /// A person who is signed in somewhere.
    SessionId
);

/// How a client names a source, destination or job: by id or by slug.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference(String);

impl Reference {
    /// Takes whatever stood in the path. What is neither an id nor a possible slug matches nothing, and never
    /// reaches the database.
    pub fn new(text: impl Into<String>) -> Self {
        let text = text.into();
        let possible = crate::slug::is_valid(&text) || uuid::Uuid::parse_str(&text).is_ok();
        Self(if possible { text } else { String::new() })
    }

    /// The id, when the text is one.
    pub fn id(&self) -> Option<uuid::Uuid> {
        uuid::Uuid::parse_str(&self.0).ok()
    }

    /// The text as a slug.
    pub fn slug(&self) -> &str {
        &self.0
    }
}
