//! What a restore has done to its target so far. Whatever ends it, an error, a cancel or its time, the error tells of this:
//! who reads it must know what is in the database now.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// See the module.
#[derive(Debug, Default)]
pub struct Touched(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    done: Vec<String>,
    now: Option<(String, Now)>,
}

/// How far the database is that is being restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Now {
    /// Within a transaction, of which the server has not seen the end.
    Open,
    /// The end was sent: it may be committed.
    Sent,
    /// Statement by statement, each of which stays.
    Piecemeal,
}

impl Touched {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A database is being restored, and is so far.
    pub fn note(&self, database: &str, now: Now) {
        self.state().now = Some((database.to_owned(), now));
    }

    /// The one that was being restored is there; or its tool said that it is not.
    pub fn over(&self, restored: bool) {
        let mut state = self.state();
        match (restored, state.now.take()) {
            (true, Some((database, _))) => state.done.push(database),
            // Only what never ended well says whether it was the end that was lost.
            (false, Some((database, Now::Sent))) => state.now = Some((database, Now::Open)),
            (_, now) => state.now = now,
        }
    }

    /// Whether something is there that another try would find.
    pub fn remains(&self) -> bool {
        let state = self.state();
        !state.done.is_empty() || state.now.as_ref().is_some_and(|(_, now)| *now != Now::Open)
    }

    /// For people, to be put after what went wrong; empty when the target was not touched.
    pub fn tell(&self) -> String {
        let state = self.state();
        let mut text = match &state.now {
            None => String::new(),
            Some((database, Now::Open)) => format!("\nNothing of it was committed to '{database}'."),
            Some((database, Now::Sent)) => {
                format!(
                    "\nThe end had been sent: the backup may be in '{database}' now, whole. Look before you try again."
                )
            }
            Some((database, Now::Piecemeal)) => format!(
                "\nA part of the backup may be in '{database}' now: restore again with overwrite, or drop the database."
            ),
        };
        if !state.done.is_empty() {
            let names: Vec<_> = state.done.iter().map(|name| format!("'{name}'")).collect();
            text += &format!("\nRestored before that, and there now: {}.", names.join(", "));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_tells_what_is_in_the_target_now() {
        let touched = Touched::default();
        assert_eq!((touched.tell(), touched.remains()), (String::new(), false));
        touched.note("a", Now::Open);
        assert_eq!((touched.tell().contains("Nothing of it was committed to 'a'"), touched.remains()), (true, false));
        touched.note("a", Now::Sent);
        assert_eq!((touched.tell().contains("may be in 'a' now, whole"), touched.remains()), (true, true));
        touched.over(true);
        touched.note("b", Now::Sent);
        touched.over(false);
        let text = touched.tell();
        assert!(text.contains("committed to 'b'") && text.contains("there now: 'a'") && touched.remains(), "{text}");
        let touched = Touched::default();
        touched.note("c", Now::Piecemeal);
        touched.over(false);
        assert_eq!((touched.tell().contains("A part of the backup may be in 'c'"), touched.remains()), (true, true));
    }
}
