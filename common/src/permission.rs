//! Permissions of callers, named `noun:verb`.

use std::collections::BTreeSet;

macro_rules! permissions {
    ($($name:ident = $text:literal),* $(,)?) => {
        /// One thing a caller may do.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Permission { $(#[doc = $text] $name),* }

        impl Permission {
            /// All of them, in the order of the documentation.
            pub const ALL: &'static [Permission] = &[$(Permission::$name),*];

            /// The name as clients write it.
            pub fn as_str(self) -> &'static str {
                match self { $(Permission::$name => $text),* }
            }
        }
    };
}

permissions! {
    JobsRead = "jobs:read",
    JobsWrite = "jobs:write",
    JobsExecute = "jobs:execute",
    HistoryRead = "history:read",
    SourcesRead = "sources:read",
    SourcesWrite = "sources:write",
    DestinationsRead = "destinations:read",
    DestinationsWrite = "destinations:write",
    StorageRead = "storage:read",
    StorageDownload = "storage:download",
    StorageRestore = "storage:restore",
    StorageDelete = "storage:delete",
    SettingsRead = "settings:read",
    SettingsWrite = "settings:write",
    ApiKeysRead = "api-keys:read",
    ApiKeysWrite = "api-keys:write",
    UsersRead = "users:read",
    UsersWrite = "users:write",
    AuditRead = "audit:read",
    ClusterRead = "cluster:read",
}

impl std::str::FromStr for Permission {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Permission::ALL.iter().copied().find(|p| p.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Permission::ALL.iter().map(|p| p.as_str()).collect();
            format!("'{text}' is not a permission; known are '*' (all) and {}", known.join(", "))
        })
    }
}

/// What a caller may do, as stored: `*` or a list of names.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct PermissionSet(BTreeSet<Permission>);

impl PermissionSet {
    /// Reads names as stored or typed; `*` stands for all.
    pub fn parse<S: AsRef<str>>(names: &[S]) -> Result<Self, String> {
        let mut set = BTreeSet::new();
        for name in names {
            match name.as_ref() {
                "*" => set.extend(Permission::ALL),
                name => {
                    set.insert(name.parse()?);
                }
            }
        }
        Ok(Self(set))
    }

    /// Reads a stored row; a name that this version does not know grants nothing.
    pub fn of_stored(names: Vec<String>) -> Self {
        Self(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// What is in the other set and not in this one.
    pub fn lacking(&self, other: &Self) -> Vec<&'static str> {
        other.0.difference(&self.0).map(|permission| permission.as_str()).collect()
    }

    /// Whether nothing is allowed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this set holds a permission.
    pub fn allows(&self, permission: Permission) -> bool {
        self.0.contains(&permission)
    }

    /// The names in a fixed order; never `*`, so that a permission invented later is not granted by an old row.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|p| p.as_str().to_owned()).collect()
    }
}
