//! Errors in the log: `Display` never repeats its `source`, so whoever logs one must walk the chain.

use std::{error::Error, fmt};

/// An error with all its causes, in one line.
pub struct Chain<'a>(pub &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::DbError;

    #[test]
    fn the_log_sees_the_cause_of_an_error() {
        let error = DbError::Sql(sqlx::Error::Protocol("what really happened".to_owned()));
        assert!(Chain(&error).to_string().contains("what really happened"), "{}", Chain(&error));
    }
}
