//! The client samples: the contract's own scripts and some more, from `docs/samples`, with a server, a key and a job
//! filled in. The console shows them, and the tests run them, from here.

/// What stands for the key in the contract's samples.
pub const PLACEHOLDER_KEY: &str = "dbm_your_api_key";
const PLACEHOLDER_SERVER: &str = "https://your-instance.com";
const PLACEHOLDER_JOB: &str = "your-job-id";
/// What a key for the samples needs.
pub const PERMISSIONS: [&str; 2] = ["jobs:execute", "history:read"];

/// One sample.
#[derive(Clone, Debug)]
pub struct Sample {
    /// A word for it.
    pub id: &'static str,
    /// Its name for people.
    pub title: &'static str,
    /// What to do with it, in a sentence.
    pub note: &'static str,
    /// What to set where it is used, with the values.
    pub variables: Vec<(&'static str, String)>,
    /// The text, with everything filled in that stands in it.
    pub text: String,
}

/// All samples for a job.
pub fn of(server: &str, key: &str, job: &str) -> Vec<Sample> {
    let fill = |text: &str| {
        text.replace(PLACEHOLDER_SERVER, server).replace(PLACEHOLDER_JOB, job).replace(PLACEHOLDER_KEY, key)
    };
    let variables = |names: [&'static str; 3]| {
        let values = [server, key, job].map(str::to_owned);
        names.into_iter().zip(values).collect()
    };
    let sample = |id, title, note, variables, text| Sample { id, title, note, variables, text: fill(text) };
    vec![
        sample(
            "curl",
            "curl",
            "Triggers the job. The answer has the id to poll by.",
            Vec::new(),
            include_str!("../../docs/samples/trigger.sh"),
        ),
        sample(
            "bash",
            "Bash",
            "Triggers the job and waits for its end. Needs curl and jq.",
            Vec::new(),
            include_str!("../../docs/samples/trigger-and-wait.sh"),
        ),
        sample(
            "cli",
            "dbackup",
            "Triggers the job and waits for its end, through restarts of the instance too. Needs the dbackup program.",
            Vec::new(),
            include_str!("../../docs/samples/trigger-by-dbackup.sh"),
        ),
        sample(
            "python",
            "Python",
            "Triggers the job and waits for its end, with the standard library alone.",
            Vec::new(),
            include_str!("../../docs/samples/trigger_and_wait.py"),
        ),
        sample(
            "ansible",
            "Ansible",
            "A playbook.",
            Vec::new(),
            include_str!("../../docs/samples/ansible-playbook.yml"),
        ),
        sample(
            "github",
            "GitHub Actions",
            "A workflow. Store these three as secrets of the repository.",
            variables(["DBACKUP_URL", "DBACKUP_API_KEY", "DBACKUP_JOB_ID"]),
            include_str!("../../docs/samples/github-actions.yml"),
        ),
        sample(
            "gitlab",
            "GitLab CI",
            "A job of a pipeline. Store these three as CI/CD variables of the project, the key masked.",
            variables(["DBACKUP_URL", "DBACKUP_API_KEY", "DBACKUP_JOB_ID"]),
            include_str!("../../docs/samples/gitlab-ci.yml"),
        ),
        sample(
            "compose",
            "Docker Compose",
            "Run it before a deployment, with these three in its environment: it fails when the backup does.",
            variables(["DBACKUP_URL", "DBACKUP_API_KEY", "BACKUP_JOB_ID"]),
            include_str!("../../docs/samples/pre-deploy-backup.sh"),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_names_the_server_the_key_and_the_job_and_no_placeholder_is_left() {
        for sample in of("http://here:3000", "dbm_key", "the-job") {
            let all = sample.variables.iter().fold(sample.text.clone(), |all, (_, value)| format!("{all}\n{value}"));
            for wanted in ["http://here:3000", "dbm_key", "the-job"] {
                assert_eq!(all.matches(wanted).count(), 1, "{wanted} in {}", sample.id);
            }
            for left in [PLACEHOLDER_SERVER, PLACEHOLDER_JOB, PLACEHOLDER_KEY] {
                assert!(!all.contains(left), "{left} in {}", sample.id);
            }
        }
    }
}
