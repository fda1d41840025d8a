//! Errors in the log: `Display` never repeats its `source`, so whoever logs one must walk the chain.

use std::{error::Error, fmt};

/// An error with all its causes, in one line.
pub struct Chain<'a>(pub &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut told = self.0.to_string();
        f.write_str(&told)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Some drivers' errors repeat their source.
            if !told.ends_with(&text) {
                write!(f, ": {text}")?;
            }
            told = text;
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
        // The driver's own text holds its cause already.
        let error = DbError::Sql(sqlx::Error::Io(std::io::Error::other("what really happened")));
        let text = Chain(&error).to_string();
        assert_eq!(text.matches("what really happened").count(), 1, "{text}");
    }
}
