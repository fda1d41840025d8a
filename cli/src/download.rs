//! `dbackup download`: fetches the files of a backup from an instance, goes on where a download broke off, and compares
//! their checksums.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use common::{db::StartError, error::Chain};
use reqwest::{Response, header};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::time::Duration;

use crate::remote::{AGAIN, Instance, PATIENCE, RemoteArgs, failed, read};

/// Longest time of one answer; a download that takes longer goes on with the next.
const LONGEST: Duration = Duration::from_secs(86_400);

/// Flags of `dbackup download`.
#[derive(clap::Args)]
pub struct DownloadArgs {
    /// The execution that made the backup
    execution: String,
    #[command(flatten)]
    remote: RemoteArgs,
    /// Folder for the files
    #[arg(long, default_value = ".")]
    to: PathBuf,
    /// Only this database of the backup, without the manifest
    #[arg(long)]
    database: Option<String>,
}

/// One file, and where copies of it lie.
struct Wanted {
    name: String,
    size: u64,
    sha256: String,
    copies: Vec<String>,
}

/// Downloads every file of a backup once, whichever copy serves; prints their paths.
pub async fn run(args: DownloadArgs) -> Result<(), StartError> {
    let instance = Instance::new(args.remote, "a key with storage:download and history:read")?;
    let path = ["api", "executions", &args.execution];
    let answer = instance.ask(|client, url| client.get(url), &path, &[]).await?;
    let wanted = wanted(&answer["data"], args.database.as_deref());
    if wanted.is_empty() {
        return Err(failed(match args.database {
            Some(database) => format!("the execution left no backup of '{database}'"),
            None => "the execution left no backup".to_owned(),
        }));
    }
    for file in &wanted {
        let target = args.to.join(&file.name);
        if target.exists() {
            return Err(failed(format!("{} is there already: nothing is overwritten", target.display())));
        }
        fetch_any(&instance, &args.execution, file, &target).await?;
        println!("{}", target.display());
    }
    Ok(())
}

fn wanted(execution: &Value, database: Option<&str>) -> Vec<Wanted> {
    let mut files: Vec<Wanted> = Vec::new();
    for artifact in execution["artifacts"].as_array().into_iter().flatten() {
        if database.is_some_and(|database| artifact["database"] != database) {
            continue;
        }
        let text = |name: &str| artifact[name].as_str().unwrap_or_default().to_owned();
        let name = text("path").rsplit('/').next().unwrap_or_default().to_owned();
        match files.iter_mut().find(|file| file.name == name) {
            Some(file) => file.copies.push(text("id")),
            None => files.push(Wanted {
                name,
                size: artifact["size"].as_u64().unwrap_or(0),
                sha256: text("sha256"),
                copies: vec![text("id")],
            }),
        }
    }
    files
}

async fn fetch_any(instance: &Instance, execution: &str, file: &Wanted, target: &Path) -> Result<(), StartError> {
    let mut last = None;
    for copy in &file.copies {
        let path = ["api", "executions", execution, "artifacts", copy, "download"];
        match fetch(instance, &path, file, target).await {
            Ok(()) => return Ok(()),
            Err(why) => {
                eprintln!("{}: {why}", file.name);
                last = Some(why);
            }
        }
    }
    Err(failed(format!("{} could not be downloaded: {}", file.name, last.unwrap_or_default())))
}

/// One copy, into a file beside the target that gets its name when it is whole. What is there of it already is kept.
async fn fetch(instance: &Instance, path: &[&str], wanted: &Wanted, target: &Path) -> Result<(), String> {
    let part = target.with_file_name(format!(".{}.part", wanted.name));
    let told = |e: std::io::Error| format!("{}: {e}", part.display());
    let mut options = fs::OpenOptions::new();
    let mut file = options.read(true).write(true).create(true).truncate(false).open(&part).map_err(told)?;
    let mut hash = Sha256::new();
    let mut have = hash_file(&mut file, &mut hash).map_err(told)?;
    let mut moved = Instant::now();
    while have < wanted.size {
        let before = have;
        let (why, pause) = match ask(instance, path, wanted, have).await? {
            Answer::Bytes(response) => (keep(response, &mut file, &mut hash, &mut have).await.map_err(told)?, AGAIN),
            Answer::Later(why, pause) => (why, pause),
        };
        if have >= wanted.size {
            break;
        }
        if have > before {
            moved = Instant::now();
        } else if moved.elapsed() > PATIENCE {
            return Err(format!("{why}; asked for {} s", PATIENCE.as_secs()));
        }
        eprintln!("{}: {why}; going on at byte {have}", wanted.name);
        tokio::time::sleep(pause).await;
    }
    if have != wanted.size || hex::encode(hash.finalize()) != wanted.sha256 {
        fs::remove_file(&part).map_err(told)?;
        return Err("what came is not what was stored: its SHA-256 differs".to_owned());
    }
    file.sync_all().map_err(told)?;
    fs::rename(&part, target).map_err(told)
}

fn hash_file(file: &mut fs::File, hash: &mut Sha256) -> std::io::Result<u64> {
    let (mut buffer, mut have) = (vec![0; 256 << 10], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(have),
            n => {
                hash.update(&buffer[..n]);
                have += n as u64;
            }
        }
    }
}

enum Answer {
    Bytes(Response),
    Later(String, Duration),
}

async fn ask(instance: &Instance, path: &[&str], wanted: &Wanted, from: u64) -> Result<Answer, String> {
    let request = instance.get(path).map_err(|e| Chain(&e).to_string())?.timeout(LONGEST);
    let etag = format!("\"{}\"", wanted.sha256);
    let request = request.header(header::RANGE, format!("bytes={from}-")).header(header::IF_RANGE, etag);
    let sent = request.send().await;
    if sent.as_ref().is_ok_and(|response| response.status().as_u16() == 206 || (from == 0 && response.status() == 200))
    {
        return sent.map(Answer::Bytes).map_err(|e| e.to_string());
    }
    match read(sent).await {
        Err(refused) => match refused.again {
            // 502: the store of this copy refuses, and would again.
            Some(again) if refused.status != Some(502) => Ok(Answer::Later(refused.why, again)),
            _ => Err(refused.why),
        },
        Ok(_) => Err("the instance does not send a part of a file: is it older than this program?".to_owned()),
    }
}

/// Writes what comes; gives why no more does.
async fn keep(
    mut response: Response,
    file: &mut fs::File,
    hash: &mut Sha256,
    have: &mut u64,
) -> std::io::Result<String> {
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) => {
                file.write_all(&chunk)?;
                hash.update(&chunk);
                *have += chunk.len() as u64;
            }
            Ok(None) => return Ok("the answer ended".to_owned()),
            Err(error) => return Ok(format!("the download broke off: {}", Chain(&error.without_url()))),
        }
    }
}
